"""What costs as it grows: the study's table."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / 'studies'))
import growth           # noqa: E402


def test_the_table_has_a_line_for_all_that_grows(capsys):
    """At a hundredth of the sizes, each with three seconds above zero, a peak and a power."""
    growth.main([], share=.01, times=1)
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [line.strip('| ').split(' | ') for line in lines[2:]]
    assert [row[0] for row in cells] == [one.what for one in growth.GROWTHS]
    for _, sizes, seconds, memory, power in cells:
        assert len(sizes.split(' / ')) == 3
        assert all(float(spent) > 0 for spent in seconds.split(' / '))
        assert int(memory.replace(',', '')) >= 0 and abs(float(power)) < 3
