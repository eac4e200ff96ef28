"""A plan's sidecar, for a plan that no TensorRT has made."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hip_trt.runtime import Limits
from hip_trt.sidecar import FileRecord, ProfileRecord, Sidecar, sidecar_path
from hip_trt.spec import ModelSpec

LIMITS = Limits(max_batch=3, max_prefill=16, max_seq_len=128, max_pages=32)


def sidecar(spec: ModelSpec, **changes: Any) -> Sidecar:
    record = FileRecord(name="engine.plan", size=4, sha256="0")
    fields: dict[str, Any] = {
        "plan": record, "model": (record.model_copy(update={"name": "model.onnx"}),), "spec": spec,
        "limits": LIMITS, "inputs": (), "outputs": (), "layers": {}, "plugin_layers": (), "flavour": "tensorrt",
        "profiles": (ProfileRecord(name="prefill", shapes={}), ProfileRecord(name="decode", shapes={})),
        "tensorrt_version": "10.99", "compute_capabilities": ("9.0",), "plugin_version": "0.1.0",
        "hip_trt_version": "0.1.0", "created": datetime.now(UTC),
    }
    return Sidecar(**{**fields, **changes})


def write_plan(folder: Path, spec: ModelSpec, **changes: Any) -> Path:
    plan = folder / "engine.plan"
    plan.write_bytes(b"plan")
    sidecar_path(plan).write_text(sidecar(spec, plan=FileRecord.of(plan), **changes).model_dump_json())
    return plan
