"""Other systems than Linux, as far as Linux can play them: without what POSIX alone gives."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae_hyperband.common import process
from vae_hyperband.common.errors import DeviceError
from vae_hyperband.common.process import available_cpus, pick_device
from vae_hyperband.training.tracker import read_rows

WITHOUT_POSIX = Path(__file__).parent.parent / "without_posix.py"


def test_without_posix_s_names_a_run_gives_the_same_bits(
    tmp_path, small_data, small_config, options, trained_once
):
    """All modules are imported; the run is stopped, continued, evaluated and reported."""
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        path = tmp_path / f"pictures/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    place = options(ckpt_seconds=0, keep_ckpts=2)
    arguments = [
        json.dumps(dataclasses.asdict(settings), default=str) for settings in (place, small_config)
    ]
    done = subprocess.run(
        [sys.executable, WITHOUT_POSIX, *arguments, tmp_path / "pictures"],
        env=os.environ | {"VAE_HYPERBAND_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    package = Path(process.__file__).parent.parent
    assert said[0] == f"{len(list(package.rglob('*.py')))} modules imported"
    assert f"{place.ckpt_folder} is in use by another process: wait for it" in done.stdout
    assert said[-1] == trained_once.weights
    assert done.stderr.count("SIGTERM: saving, then stopping") == 2
    assert len(list(place.ckpt_folder.glob("*.pt"))) == 4  # best, latest and two earlier ones
    rows, expected = (
        [(row["step"], row["split"], row["total_loss"]) for row in read_rows(folder)]
        for folder in (
            place.log_folder / "metrics.jsonl",
            trained_once.log_folder / "metrics.jsonl",
        )
    )
    assert rows == expected
    left = [
        path for name in ("checkpoints", "logs", "cache") for path in tmp_path.glob(f"{name}/**/.*")
    ]
    assert left == []  # no temporary file, and no lock: it goes with its holder


def test_all_cpus_are_available_where_no_affinity_is(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(process, "cpu_quotas", lambda: [])
    assert available_cpus() == os.cpu_count()


def test_a_device_without_float64_is_refused_and_never_picked(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match=r"^--device mps is not supported: use --device cpu"):
        pick_device("mps")
