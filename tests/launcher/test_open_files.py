import resource

import pytest

from loraplex.open_files import raise_open_files

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(1024, 524_288, 65_536), (1024, ENDLESS, 65_536), (1024, 20_000, 20_000), (100_000, 524_288, None),
     (ENDLESS, ENDLESS, None), (1024, 4096, 4096), (4096, 4096, None)],
)  # fmt: skip
def test_the_limit_is_raised_as_far_as_it_may_be_and_few_are_said(
    soft: int, hard: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (soft, hard)

    def change(what: int, new: tuple[int, int]) -> None:
        nonlocal limits
        assert what == resource.RLIMIT_NOFILE and new[1] == hard
        limits = new

    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", change)
    warning = raise_open_files()
    assert limits == (raised or soft, hard)
    assert (warning is not None) == (hard == 4096)
    assert warning is None or ("at most 4096 files" in warning and "--ulimit nofile" in warning)
