"""The table of studies/speed.py that sets us beside peers; those themselves are not needed."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / 'studies'))
import speed            # noqa: E402


def test_peers_are_a_table_and_those_that_lack_a_line(capsys, monkeypatch):
    """A row with both medians and their ratio; a peer that is not installed is named, and the others go on."""
    clock = iter(range(1000))
    monkeypatch.setattr(speed.time, 'process_time', lambda: next(clock))

    def compare_absent():
        import peer_that_nobody_has         # noqa: F401
        yield

    def compare_fake():
        yield 'nothing', lambda: next(clock), 'fake 1.0', lambda: [next(clock) for _ in range(3)]
    speed.time_peers([compare_absent, compare_fake])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ['| nothing | 2 | fake 1.0 | 4 | 0.50 |',
                         "left out: compare_absent (No module named 'peer_that_nobody_has')"]
