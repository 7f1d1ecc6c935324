"""Animate cases: what becomes of a face (motion encoder, face encoder), and how a reference and videos are prepared."""

from __future__ import annotations

from tests.golden.cases import Case
from tests.golden.checks import Check, close

TOLERANCE = 1e-4


def matches_motion_encoder(case: Case) -> bool:
    return {"size", "style_dim", "motion_dim"} == case.config.keys()


def run_motion_encoder(case: Case) -> list[Check]:
    from wan.models.dit.adapters.motion import MotionEncoder

    encoder = MotionEncoder(**case.config)
    encoder.load_state_dict({**encoder.state_dict(), **case.group("weights")})  # its filters have values of their own
    faces, expected = case.tensors["inputs/face_images"], case.group("outputs")
    results = {
        "appearance": encoder.appearance(faces),
        "motion_feat": encoder.coefficients(faces),
        "direction_basis": encoder.dec["direction"].basis(),
        "motion": encoder(faces),
    }
    return [close(name, results[name], wanted, TOLERANCE) for name, wanted in expected.items()]


def matches_face_encoder(case: Case) -> bool:
    return {"in_dim", "hidden_dim", "num_heads"} == case.config.keys() and bool(case.tags("outputs/face_tokens"))


def run_face_encoder(case: Case) -> list[Check]:
    from wan.models.dit.adapters.animate import FaceEncoder

    encoder = FaceEncoder(**case.config)
    encoder.load_state_dict(case.group("weights"))
    tokens = encoder(case.tensors["inputs/motion"])
    return [close("face_tokens", tokens, case.tensors["outputs/face_tokens"], TOLERANCE)]
