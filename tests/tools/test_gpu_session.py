"""The GPU session: that a part's result is written when it is there, whatever becomes of the others."""

import json
import re
import sys
import time

import gpu_session
import pytest
from bench import options
from bench.contenders import parse_contenders
from gpu_session import Part, Report, chosen, run_session, stages

from tests.helpers import ROOT, run_tool
from utils import UserError, process_runs


def stub(name: str, code: str, limit: float = 60) -> Part:
    return Part(name, [sys.executable, "-c", code, "FOLDER"], limit)


WRITES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "result.md").write_text("# Speed\\n\\n| a table |\\n")
(folder / "result.json").write_text(json.dumps({"images": 7}))
(folder / "half.json").write_text('{"images":')
"""
FAILS = "print('all is well'); print('now it is not'); raise SystemExit(3)"
# Its child has a group of its own, as the runs of the fault drill have.
HANGS = """
import subprocess, sys, time
child = [sys.executable, "-c", "import os, time; print('child', os.getpid(), flush=True); time.sleep(60)"]
subprocess.Popen(child, start_new_session=True)
time.sleep(60)
"""


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_parts_are_reported_as_they_end(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "GRACE", 0.5)
    # The last part ends well only if the results of those before it are there.
    looks = f"import pathlib; assert 'timed out' in pathlib.Path({str(tmp_path / 'report.md')!r}).read_text()"
    partly = WRITES.replace('{"images": 7}', '{"rows": [{"problem": ""}, {"problem": "out of memory"}]}')
    plan = [
        [stub("writes", WRITES), stub("fails", FAILS), stub("partly", partly)],
        [stub("hangs", HANGS, limit=2)],
        [stub("looks", looks)],
    ]
    outcomes = run_session(plan, Report(tmp_path), seconds=60)
    found = {outcome.part: outcome for outcome in outcomes}
    statuses = {name: outcome.status for name, outcome in found.items()}
    assert statuses == {"writes": "ok", "fails": "failed", "partly": "failed", "hangs": "timed out", "looks": "ok"}
    assert found["fails"].last_lines == ["all is well", "now it is not"]
    assert found["writes"].data == {"result": {"images": 7}}
    assert [line["part"] for line in read(tmp_path)] == [outcome.part for outcome in outcomes]
    report = (tmp_path / "report.md").read_text()
    assert "### Speed\n" in report
    assert "now it is not" in report
    (child,) = re.findall(r"child (\d+)", (tmp_path / "log.txt").read_text())
    assert not process_runs(int(child))


def test_no_part_runs_beyond_the_session(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "GRACE", 0.2)
    started = time.monotonic()
    outcomes = run_session([[stub("hangs", HANGS)], [stub("late", WRITES)]], Report(tmp_path), seconds=1)
    assert [outcome.status for outcome in outcomes] == ["timed out", "no time left"]
    assert time.monotonic() - started < 20
    assert [line["status"] for line in read(tmp_path)] == ["timed out", "no time left"]


def test_missing_packages_are_said_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_session, "TEST_PACKAGES", ("pytest", "nonesuch"))
    result = run_tool(monkeypatch, capsys, gpu_session, "--output", tmp_path / "new")
    assert result.status == 1
    assert "nonesuch; see requirements.txt" in result.err
    assert "pytest" not in result.err
    assert not (tmp_path / "new").exists()


def test_chosen_parts():
    plan = stages("cpu", tiny=True)
    assert [[part.name for part in stage] for stage in chosen(plan, ["resume", "tests"], ["tests"])] == [["resume"]]
    with pytest.raises(UserError, match="--skip nonesuch: accepted: tests, eager_inference"):
        chosen(plan, None, ["nonesuch"])


@pytest.mark.parametrize(("device", "tiny"), [("cuda", False), ("cpu", True)])
def test_commands_are_accepted(device, tiny):
    """Those of the session itself, which only a GPU can run, as far as their options go."""
    parts = [part for stage in stages(device, tiny) for part in stage]
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        scripts = [word for word in part.command if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), part
        if "tools/benchmark.py" in part.command:
            args = options.parse_args(part.command[2:], "")
            assert parse_contenders(args.contenders, args.modes)
