from loraplex.restarts import FORGIVEN_S, LONGEST_DELAY_S, Restarts


def test_losses_in_a_row_wait_longer_each_time_until_the_limit() -> None:
    restarts = Restarts(9)
    delays = [restarts.delay_s(now) for now in range(10)]
    assert delays == [0, 1, 2, 4, 8, 16, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S, None]


def test_a_limit_of_nought_starts_nothing_again() -> None:
    assert Restarts(0).delay_s(1.0) is None


def test_a_loss_soon_after_a_start_is_the_same_fault_still() -> None:
    restarts = Restarts(2)
    assert restarts.delay_s(0.0) == 0
    restarts.ready(10.0)
    assert restarts.delay_s(10.0 + FORGIVEN_S - 1) == 1
    restarts.ready(10.0 + FORGIVEN_S)
    assert restarts.delay_s(11.0 + FORGIVEN_S) is None


def test_a_loss_long_after_a_start_is_a_new_fault() -> None:
    restarts = Restarts(1)
    assert restarts.delay_s(0.0) == 0
    restarts.ready(10.0)
    assert restarts.delay_s(10.0 + FORGIVEN_S) == 0
