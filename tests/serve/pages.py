"""The page of a server without a browser: its components and events, by what gradio's scripts would send."""

import json
import secrets
import uuid


class Tab:
    """One that has loaded the page. values: of components, by the names that the page gives them (`elem_id`)."""

    def __init__(self, server, **headers):
        self.server, self.headers, self.session = server, headers, secrets.token_hex(8)
        status, self.config, _ = server.ask("GET", "/config", headers=headers)
        assert status == 200, self.config
        self.props = {one["id"]: dict(one["props"]) for one in self.config["components"]}
        self.ids = {one["props"].get("elem_id"): one["id"] for one in self.config["components"]}
        self.fire(None, "load")

    def __getitem__(self, name):
        return self.props[self.ids[f"swan-{name}"]]

    def fill(self, **values):
        for name, value in values.items():
            self[name]["value"] = value

    def event(self, name, event):
        """The first that a component, or the page, has of this kind, with its inputs as they are now."""
        own = self.ids[f"swan-{name}"] if name else None
        found = next(
            one
            for one in self.config["dependencies"]
            if any(kind == event and own in (None, target) for target, kind in one["targets"])
        )
        return found, self.body(found, own)

    def body(self, found, own=None):
        """What is sent for one of the events of the page. own: the component that is used"""
        states = {one["id"] for one in self.config["components"] if one["type"] == "state"}
        data = [None if one in states else self.props[one].get("value") for one in found["inputs"]]
        return {"data": data, "fn_index": found["id"], "session_hash": self.session, "trigger_id": own}

    def fire(self, name, event="click", **data):
        """What happens when a component is used; its outputs are values then."""
        found, body = self.event(name, event)
        status, told, _ = self.post(body | ({"event_data": data} if data else {}))
        assert status == 200, told
        for one, output in zip(found["outputs"], told["data"]):
            is_update = isinstance(output, dict) and output.get("__type__") == "update"
            self.props[one] |= output if is_update else {"value": output}

    def post(self, body):
        return self.server.ask("POST", "/gradio_api/run/predict", body, self.headers)

    def tick(self):
        self.fire(None, "tick")

    def send(self, data, name="a.png"):
        """The file as a component has it, once it is there."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}", **self.headers}
        status, told, _ = self.server.ask(
            "POST", "/gradio_api/upload", head + data + f"\r\n--{mark}--\r\n".encode(), kind
        )
        assert status == 200, told
        [path] = told if isinstance(told, list) else json.loads(told)
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    @property
    def message(self):
        return self["message"].get("value") or ""

    @property
    def jobs(self):
        return self.server.ask("GET", "/v1/videos?limit=100")[1]["data"]
