"""Whose turn it is: the owner's, or while that one computes somebody else's."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gpu_worker.loan import Loan

# Nothing here takes a millisecond; only a bug makes it take this long.
SECONDS = 20.0


def elsewhere(call: Callable[[], bool]) -> bool:
    """The answer of a call on another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(SECONDS)


def test_what_is_lent_can_be_borrowed() -> None:
    loan, used = Loan(), list[str]()
    with loan, loan.lend():
        assert elsewhere(lambda: loan.borrow(lambda: used.append("borrowed")))
    assert used == ["borrowed"]


def test_what_is_owned_or_nobodys_cannot() -> None:
    loan, used = Loan(), list[str]()
    assert not elsewhere(lambda: loan.borrow(lambda: used.append("nobody's")))
    with loan:
        assert not elsewhere(lambda: loan.borrow(lambda: used.append("owned")))
    with loan:
        assert not elsewhere(lambda: loan.borrow(lambda: used.append("taken")))
    assert used == []


def test_who_came_too_early_is_served_once_when_it_is_lent() -> None:
    loan, used = Loan(), list[str]()
    elsewhere(lambda: loan.borrow(lambda: used.append("nobody's")))
    with loan:
        elsewhere(lambda: loan.borrow(lambda: used.append("owned")))
        for _ in range(2):
            with loan.lend():
                elsewhere(lambda: loan.borrow(lambda: used.append("lent")))
    assert used == ["nobody's", "owned", "lent", "lent"]


def test_who_came_too_early_is_served_by_the_owner() -> None:
    loan, threads = Loan(), list[int]()
    elsewhere(lambda: loan.borrow(lambda: threads.append(threading.get_ident())))
    with loan, loan.lend():
        pass
    assert threads == [threading.get_ident()]


def test_the_owner_gets_it_back_when_the_borrower_is_done() -> None:
    loan, borrowed, done, order = Loan(), threading.Event(), threading.Event(), list[str]()

    def use() -> None:
        borrowed.set()
        done.wait(SECONDS)
        order.append("borrower")

    with ThreadPoolExecutor(1) as pool:
        with loan:
            with loan.lend():
                answer = pool.submit(loan.borrow, use)
                assert borrowed.wait(SECONDS)
                threading.Timer(0.05, done.set).start()
            order.append("owner")
        assert answer.result(SECONDS)
    assert order == ["borrower", "owner"]


def test_what_is_lent_twice_is_lent_until_the_first_ends() -> None:
    loan, used = Loan(), list[str]()
    with loan:
        with loan.lend():
            with loan.lend():
                pass
            assert elsewhere(lambda: loan.borrow(lambda: used.append("still lent")))
        assert not elsewhere(lambda: loan.borrow(lambda: used.append("owned")))
        assert used == ["still lent"]


def test_a_thread_that_does_not_own_lends_nothing() -> None:
    loan = Loan()

    def lend_and_borrow() -> bool:
        with loan.lend():
            return loan.borrow(lambda: None)

    with loan:
        assert not elsewhere(lend_and_borrow)


def test_it_comes_back_after_an_error() -> None:
    loan = Loan()
    try:
        with loan, loan.lend():
            raise ValueError
    except ValueError:
        pass
    with loan, loan.lend():
        assert elsewhere(lambda: loan.borrow(lambda: None))
