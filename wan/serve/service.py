"""What a server does, whatever routes ask for it: takes jobs, shows them, ends them, and forgets the old ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse

from wan.remote.cluster import Place
from wan.serve.fields import Wanted
from wan.serve.inputs import Inputs, video_id
from wan.serve.metrics import Metrics
from wan.serve.models import Loras, Model
from wan.serve.pictures import SHEET, THUMBNAIL
from wan.serve.refused import Refused, bad, without_paths
from wan.serve.store import Job, KeyTaken, NotWritten, Store
from wan.serve.workers import Workers, say

_SWEEP_S = 20.0
_MOST_KEY = 255
_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Settings:
    """Of one server.

    keys: of clients, none: whoever reaches it; max_s: that a video may be expected to take; keep_s, keep_bytes: of jobs
    that are over; workers: None: as many as there are GPUs for; ranks: processes of each, which make a video together;
    preview_every: where a request does not say. None elsewhere: no limit
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    allow_urls: bool = False
    max_queue: int = 100
    max_s: float | None = None
    max_upload_bytes: int = 200_000_000
    keep_s: float | None = None
    keep_bytes: int | None = None
    workers: int | None = None
    ranks: int = 1
    preview_every: int = 0
    quiet: bool = False


class Service:
    """Made within an event loop, and used by its thread. places: see Workers."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        models: Mapping[str, Model],
        loras: Loras,
        places: Sequence[Place] | None = None,
    ):
        self.settings, self.store, self.models, self.loras = settings, store, models, loras
        self.metrics = Metrics()
        log = (lambda text: None) if settings.quiet else say
        how_many = (settings.workers, settings.ranks)
        self.workers = Workers(store, models, self.metrics, *how_many, self._free, log, places)
        self._inputs = Inputs(settings.allow_urls, settings.max_upload_bytes)
        self._accepting = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.metrics.gauges(
            {
                "swan_jobs_queued": ("Jobs that wait", lambda: store.count("queued")),
                "swan_jobs_running": ("Jobs that are made", lambda: store.count("in_progress")),
                "swan_workers_ready": ("Workers that are ready", lambda: self.workers.state["ready"]),
                "swan_kept_bytes": ("Files of all jobs", store.total_bytes),
            }
        )

    def start(self) -> None:
        self.workers.start()
        self._later(self._sweep())

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.workers.close()
        self.store.checkpoint()
        self.store.close()

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Jobs

    async def accept(self, wanted: Wanted, key: str | None = None, remixed_from: str | None = None) -> Job:
        """Queue what a request asks for, once its files are here and it can be made. Raises Refused."""
        if key is not None and not (0 < len(key) <= _MOST_KEY and key.isprintable()):
            raise bad("Idempotency-Key", f"an idempotency key has 1 to {_MOST_KEY} letters")
        if key is None or self.store.by_key(key) is None:
            self._check_room()
        self._accepting += 1
        id, folder = self.store.new_folder()
        try:
            sources = {flag: self._resolved(flag, source) for flag, source in wanted.sources.items()}
            files = await asyncio.to_thread(self._inputs.store, sources, folder)
            digest = await asyncio.to_thread(_digest, wanted, files, folder) if key is not None else ""
            job = Job(id, wanted.model.name, wanted.options, files, remixed_from=remixed_from, digest=digest, key=key)
            if key is not None and (there := self.store.by_key(key)) is not None:
                raise KeyTaken(there)
            facts = await self.workers.check(wanted.model, self.store.options(job))
            self._check_time(facts["expected_seconds"])
            every = wanted.preview_every or self.settings.preview_every
            options = {**wanted.options, "seed": facts["seed"]}  # a video that is begun again is the same one
            fields = {**vars(job), "options": options, "facts": facts, "preview_every": every}
            job = self.store.add(Job(**fields))
        except KeyTaken as taken:
            await asyncio.to_thread(self.store.remove_folder, id)
            if taken.job.digest != digest:
                told = "this idempotency key was used for another request"
                raise Refused(422, told, "idempotency_key_reused", "Idempotency-Key") from None
            return taken.job
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self.store.remove_folder, id))
            raise
        finally:
            self._accepting -= 1
        self.metrics.accepted(job)
        self.workers.give_out()
        return job

    def _check_room(self) -> None:
        queued = self.store.count("queued")
        if queued + self._accepting >= self.settings.max_queue:
            left = [one.left for one in self.workers.progress.values() if one.left is not None]
            retry_s = min(max(1, round(min(left, default=10))), 600)
            raise Refused(429, f"{queued} videos are queued, the most there may be", "queue_full", retry_s=retry_s)

    def _check_time(self, seconds: float) -> None:
        if self.settings.max_s is not None and seconds > self.settings.max_s:
            told = f"this video would take about {seconds / 3600:.3g} hours"
            raise bad(
                None,
                f"{told}, and {self.settings.max_s / 3600:g} are allowed: make it shorter, smaller or in fewer steps",
            )

    def _resolved(self, flag: str, source: Any) -> Any:
        """With the file of a video that is named by its id."""
        if isinstance(source, list):
            return [self._resolved(flag, one) for one in source]
        if (id := video_id(source)) is None:
            return source
        job = self.store.get(id) if isinstance(id, str) else None
        if job is None or job.state != "completed":
            raise Refused(400, f"{flag}: there is no completed video of this id", "video_not_found", flag)
        return self.store.result(job)

    def job(self, id: str) -> Job:
        """Raises Refused where there is none."""
        if (job := self.store.get(id)) is None:
            raise Refused(404, "there is no video of this id", "video_not_found", "video_id")
        return job

    async def remix(self, id: str, prompt: Any) -> Job:
        """Another video with the settings of one, and another prompt: made of that one, where its model can do so."""
        source = self.job(id)
        if not isinstance(prompt, str) or not prompt.strip():
            raise bad("prompt", "prompt is missing", "missing_required_parameter")
        model = self.models.get(source.model)
        if source.state != "completed" or model is None:
            raise bad("video_id", f"only a completed video can be remixed, and this one is {source.state}")
        inputs = self.store.folder_of(id) / "inputs"
        sources = {
            flag: [inputs / one for one in name] if isinstance(name, list) else inputs / name
            for flag, name in source.files.items()
        }
        options = {name: value for name, value in source.options.items() if name != "prompts"}
        if "video" in model.kind.inputs and not {"continue_from", "last_frame", "audio"} & sources.keys():
            sources["video"] = self.store.result(source)
        return await self.accept(
            Wanted(model, {**options, "prompt": prompt}, sources, source.preview_every), remixed_from=id
        )

    def delete(self, id: str) -> None:
        """A job and its files; what makes it stops after its step."""
        job = self.job(id)
        self.store.delete(id)
        if job.is_over:
            self._free(id)
        else:
            self.metrics.cancelled(job)
            self.workers.cancel(id)

    def cancel(self, id: str) -> bool:
        """End a job, which stays as one that failed. Whether there was anything to end."""
        job = self.job(id)
        if job.is_over:
            return False
        self.store.fail(id, "cancelled", "cancelled")
        self.metrics.cancelled(job)
        self.workers.cancel(id)
        return True

    def _free(self, id: str) -> None:
        """Nobody writes to the files of a job any more."""
        if self.store.get(id) is None:
            self._later(asyncio.to_thread(self.store.remove_folder, id))

    async def _sweep(self) -> None:
        """Forget what is old, and bring the database's log into its file."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            keep = self.settings.keep_s
            before = None if keep is None else time.time() - keep
            for id in self.store.outdated(before, self.settings.keep_bytes):
                with contextlib.suppress(NotWritten):  # the disk is full: its files go first, the row another time
                    self.store.delete(id)
                self._free(id)
            await asyncio.to_thread(self.store.checkpoint)

    # What is shown

    def view(self, job: Job) -> dict[str, Any]:
        """A job as OpenAI's `Video`, and what we know beside."""
        facts, progress = job.facts, self.workers.progress.get(job.id)
        percent = 100 if job.state == "completed" else progress.percent if progress else 0
        keep = self.settings.keep_s
        error = job.error and {"code": job.error["code"], "message": without_paths(job.error["message"])}
        told = {
            "id": job.id,
            "object": "video",
            "model": job.model,
            "status": job.state,
            "progress": percent,
            "created_at": int(job.created_at),
            "completed_at": int(job.completed_at) if job.state == "completed" else None,
            "expires_at": int(job.completed_at + keep) if job.completed_at and keep is not None else None,
            "prompt": job.options.get("prompt"),
            "seconds": f"{round(facts['frames'] / facts['fps'], 2):g}",
            "size": f"{facts['width']}x{facts['height']}",
            "remixed_from_video_id": job.remixed_from,
            "error": error,
            "num_frames": facts["frames"],
            **{name: facts[name] for name in ("fps", "steps", "seed", "warnings")},
            "expected_seconds": round(facts["expected_seconds"], 1),
        }
        if progress is not None and job.state == "in_progress":
            told |= {"stage": progress.stage, "seconds_left": progress.left}
        if job.state == "completed":
            told["inference_time_s"] = round(sum(job.report["seconds"].values()), 3)
            told |= {"revised_prompt": job.report["prompt"]} if "prompt" in job.report else {}
        return told

    def content(self, id: str, variant: str = "video") -> FileResponse:
        """The file of a job."""
        job = self.job(id)
        names = {"video": job.file, "thumbnail": THUMBNAIL, "spritesheet": SHEET}
        if variant not in names:
            raise bad("variant", f"variant must be one of: {', '.join(names)}")
        if job.state != "completed":
            raise Refused(404, f"this video is {job.state}: there is no file of it", "video_not_ready", "video_id")
        path = self.store.folder_of(id) / names[variant]
        if not path.is_file():
            raise Refused(404, "the file of this video is gone", "file_gone", "video_id")
        download = f"{id}{path.suffix}" if variant == "video" else f"{id}-{path.name}"
        return FileResponse(path, media_type=_KINDS[path.suffix], filename=download)

    def place(self, job: Job) -> dict[str, int]:
        """Of one that waits, how many are begun before it: not in lists, for it takes counting."""
        return {"queue_position": self.workers.position(job)} if job.state == "queued" else {}

    def poll_after_ms(self, job: Job) -> int | None:
        """When it is worth asking again; None: never."""
        if job.is_over:
            return None
        progress, left = self.workers.progress.get(job.id), job.facts["expected_seconds"]
        if progress is not None and progress.left is not None:
            left = progress.left
        return round(1000 * min(max(left / 8, 0.25), 10))


def _digest(wanted: Wanted, files: Mapping[str, Any], folder: Path) -> str:
    """Of all that a request asks for, with what its files hold."""
    told = hashlib.sha256(json.dumps([wanted.model.name, wanted.options, files], sort_keys=True).encode())
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                told.update(block)
    return told.hexdigest()
