import json

from tritprune.training.curves import CurveFile


def test_lines_come_back(tmp_path):
    file = CurveFile(tmp_path / "curves.jsonl")
    file.append({"step": 1, "loss/train": 0.5})
    file.append({"step": 2, "loss/train": float("nan")})
    assert file.records() == [{"step": 1, "loss/train": 0.5}, {"step": 2, "loss/train": None}]


def test_a_line_cut_by_a_kill_is_dropped_and_the_rest_stays(tmp_path):
    path = tmp_path / "curves.jsonl"
    whole = json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n"
    path.write_text(whole + '{"step": 3, "lo')
    file = CurveFile(path)
    assert [r["step"] for r in file.records()] == [1, 2]
    file.keep_until(5)
    assert path.read_text() == whole


def test_resuming_cuts_the_curves_back_to_the_checkpoint(tmp_path):
    file = CurveFile(tmp_path / "curves.jsonl")
    for step in range(1, 6):
        file.append({"step": step})
    file.keep_until(3)
    assert [r["step"] for r in file.records()] == [1, 2, 3]


def test_a_missing_file_is_empty(tmp_path):
    file = CurveFile(tmp_path / "none.jsonl")
    file.keep_until(3)
    assert file.records() == []
