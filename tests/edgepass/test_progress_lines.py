"""Progress where there is no terminal: a line a stage, with the time left, and whose it is."""

from edgepass import console


def lines(capsys, monkeypatch, calls) -> list[str]:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with console.show_progress() as progress:
        for stage, *counts in calls:
            progress(stage, *counts)
            clock[0] += 5.0
    return capsys.readouterr().err.splitlines()


def test_the_time_left_is_that_of_the_parts_done_since_it_began(capsys, monkeypatch) -> None:
    calls = [("load",), ("calibrate", 6, 10), ("calibrate", 7, 10), ("calibrate", 10, 10)]
    assert lines(capsys, monkeypatch, calls) == [
        "edgepass: load",
        "edgepass: calibrate 6 of 10",
        "edgepass: calibrate 7 of 10, 15 s left",
        "edgepass: calibrate 10 of 10",
    ]


def test_of_several_processes_each_says_which_it_is(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("RANK", "3")
    assert lines(capsys, monkeypatch, [("load",)]) == ["edgepass: [3] load"]
