"""`make gpu` on the CPU: its steps run, and what goes wrong in one of them leaves the others alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import FOREVER, PATIENCE
from tests.versions import needs_torch
from tools.gpu.__main__ import check_names, reason_to_skip, run
from tools.gpu.steps import Step, steps

ROOT = Path(__file__).parents[1]


def python(code: str, is_json: bool = True) -> Step:
    return Step("try", (sys.executable, "-c", code), 9, is_json=is_json)


def test_the_steps_fit_a_quarter_of_an_hour(tmp_path: Path) -> None:
    listed = steps("cuda", "qwen2-vl-7b", tmp_path)
    assert sum(step.limit_s for step in listed) <= 15 * 60
    assert len({step.name for step in listed}) == len(listed)


def test_what_a_machine_lacks_is_said() -> None:
    assert reason_to_skip(Step("try", (), 9, on_gpu=True), "cpu", [], 60) == "it needs a GPU"
    missing = Step("try", (), 9, modules=("json", "no_such_module", "no_such.package"))
    assert reason_to_skip(missing, "cuda", [], 60) == "no_such_module, no_such.package is not installed"
    assert reason_to_skip(python(""), "cpu", ["other"], 60) == "not among --only"
    assert reason_to_skip(python(""), "cpu", [], 0.5) == "no time is left"
    assert reason_to_skip(python(""), "cpu", ["try"], 60) is None


def test_a_step_that_there_is_not_is_no_step_left_out() -> None:
    check_names(["kernels", "inductor decode"], ["kernels", "inductor decode", "live"])
    with pytest.raises(SystemExit, match="--only: 'kernel' is no step: choose among kernels, live"):
        check_names(["kernels", "kernel"], ["kernels", "live"])


@pytest.mark.slow
def test_what_goes_wrong_is_kept_with_what_was_printed() -> None:
    assert run(python("print('{\"a\": 1}')"), PATIENCE)["figures"] == {"a": 1}
    assert run(python("print('passed')", is_json=False), PATIENCE)["figures"] == "passed\n"
    assert run(python("print('passed')"), PATIENCE)["outcome"] == "printed no JSON"
    failed = run(python("import sys; print('before'); sys.exit('wrong')"), PATIENCE)
    assert failed["outcome"] == "failed with exit code 1"
    assert failed["output"] == "before\nwrong\n"
    wrong = run(python("import sys; print('{\"right\": false}'); sys.exit(17)"), PATIENCE)
    assert (wrong["outcome"], wrong["figures"]) == ("failed with exit code 17", {"right": False})
    late = run(python(f"import time; print('begun', flush=True); time.sleep({FOREVER})"), 5)
    assert late["outcome"] == "ended after 5 s"
    assert late["output"] == "begun\n"


@pytest.mark.slow
@needs_torch
def test_the_command_runs_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--device", "cpu", "--shape", "tiny", "--work", str(tmp_path)]
    only = "doctor,kernels,attention,live,onnxruntime decode"
    done = subprocess.run([*command, "--only", only], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {name: step["outcome"] for name, step in results["steps"].items()}
    assert outcomes["kernels"] == "left out: it needs a GPU"
    assert outcomes["inductor prefill"] == "left out: not among --only"
    for name in ("doctor", "attention", "live", "onnxruntime decode"):
        assert outcomes[name] == "done", results["steps"][name]
    assert results["steps"]["attention"]["figures"]["forms"]["split"]["problem"] is None
    assert results["steps"]["doctor"]["figures"]["right"]
    assert results["steps"]["live"]["figures"]["cost 0.3"]["speed_up"] > 0
    assert results["steps"]["onnxruntime decode"]["figures"]["ours at cost 0.3"]["gb_read_per_second"] > 0
