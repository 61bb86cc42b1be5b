"""Many requests at once get what each would get alone; queues are bounded; requests can be given up."""

import threading
from dataclasses import replace

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.model.sampling import Sampling
from policypatch.serve.engine import BusyError, Engine, Job

GREEDY = Sampling(0.0, 1.0, 12)
STACKS = ((), ("tox",), ("bias",), ("tox", "bias"), ("bias", "tox"))


class Told:
    """What a job was told."""

    def __init__(self):
        self.text, self.why, self.ended = "", None, threading.Event()

    def __call__(self, text: str, why: str | None) -> None:
        self.text += text
        if why is not None:
            assert self.why is None, "a job ends once"
            self.why = why
            self.ended.set()


def job(number: int = 0, stack: tuple[str, ...] = (), sampling: Sampling = GREEDY, **more) -> Job:
    prompt = [20 + (number * step) % 200 for step in range(1, 3 + number % 7)]
    return Job(prompt, stack, sampling, seed=number, tell=Told(), **more)


def answered(engine: Engine, jobs: list[Job]) -> None:
    """Have the engine do them, without a thread."""
    for each in jobs:
        engine.submit(each)
    while engine.queue or engine.running:
        engine.round()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 0.9, 12)], ids=["greedy", "sampled"])
def test_each_gets_what_it_would_get_alone(engine: Engine, alone, sampling: Sampling):
    lengths = [replace(sampling, max_new_tokens=n) for n in (12, 3, 7, 1)]
    jobs = [job(i, STACKS[i % 5], lengths[i % 4]) for i in range(8)]
    answered(engine, jobs)
    for each in jobs:
        assert each.written == alone(each)
        assert each.tell.text == engine.base.decode_after(each.prompt, each.written)
        assert each.tell.why == ("length" if len(each.written) == each.sampling.max_new_tokens else "stop")


def test_greedy_and_sampled_ones_share_a_batch(engine: Engine, alone):
    jobs = [job(i, ("tox",), Sampling((0.0, 1.0)[i % 2], (0.9, 1.0)[i // 2], 10)) for i in range(4)]
    answered(engine, jobs)
    assert [each.written for each in jobs] == [alone(each) for each in jobs]


def test_the_queue_is_bounded(engine: Engine):
    for i in range(8):
        engine.submit(job(i))
    with pytest.raises(BusyError, match="8 requests are waiting"):
        engine.submit(job(9))


def test_a_given_up_request_makes_room(engine: Engine, alone):
    long = [job(i, sampling=Sampling(0.0, 1.0, 100)) for i in range(4)]
    short = job(5)
    for each in (*long, short):
        engine.submit(each)
    engine.round()
    assert len(engine.running) == 4 and len(engine.queue) == 1
    long[1].cancelled = True
    while not short.tell.ended.is_set():
        engine.round()
    assert long[1].tell.why == "cancelled" and short.written == alone(short)
    assert all(each.tell.why in (None, "stop") for each in (long[0], long[2], long[3]))


def test_one_given_up_while_it_waits_is_never_read(engine: Engine):
    waiting = job(1, cancelled=True)
    answered(engine, [waiting])
    assert waiting.tell.why == "cancelled" and not waiting.written


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(engine: Engine, cut: int):
    whole = job(3)
    answered(engine, [whole])
    text = whole.tell.text
    stop = text[len(text) // 2 :][:cut]
    again = job(3, stop=[stop, "not in it"])
    answered(engine, [again])
    assert again.tell.text == text[: text.index(stop)] and again.tell.why == "stop"


def test_what_fails_ends_alone(engine: Engine, alone):
    bad, good = job(1), job(2)
    bad.prompt = [10_000]
    answered(engine, [bad, good])
    assert bad.tell.why == "error" and good.written == alone(good)


@pytest.mark.parametrize(
    ("prompt", "stack", "most", "said"),
    [
        ([], (), 1, "no tokens"),
        ([5] * 100, ("tox",), 25, "100 tokens and 25 new ones behind 4 vectors"),
        ([5] * 128, (), None, "128 tokens behind 0 vectors"),
    ],
)
def test_what_does_not_fit_is_refused(
    engine: Engine, prompt: list[int], stack: tuple[str, ...], most: int | None, said: str
):
    with pytest.raises(PolicyPatchError, match=said):
        engine.check(prompt, stack, most)


def test_without_a_limit_the_answer_may_fill_the_context(engine: Engine):
    assert engine.check([5] * 100, ("tox", "bias"), None) == 20


def test_the_thread_answers_and_stops_when_all_is_answered(engine: Engine, alone):
    engine.start()
    jobs = [job(i, STACKS[i % 5]) for i in range(8)]
    for each in jobs:
        engine.submit(each)
    engine.stop()
    assert [each.written for each in jobs] == [alone(each) for each in jobs]
    with pytest.raises(BusyError, match="stopping"):
        engine.submit(job())


def test_stopping_gives_up_what_takes_too_long(engine: Engine):
    endless = [job(i, sampling=Sampling(0.0, 1.0, 100)) for i in range(6)]
    engine.start()
    for each in endless:
        engine.submit(each)
    engine.stop(patience=0.01)
    assert all(each.tell.ended.wait(10) for each in endless)
    assert {each.tell.why for each in endless} <= {"cancelled", "stop", "length"}


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1e-300, 6), Sampling(1e-40, 1.0, 6)])
def test_settings_at_the_edge_of_float32_harm_nobody(engine: Engine, alone, sampling: Sampling):
    odd, good = job(1, sampling=sampling), job(2)
    answered(engine, [odd, good])
    assert odd.written == alone(replace(odd, sampling=replace(sampling, temperature=0.0)))
    assert good.written == alone(good)


@pytest.mark.parametrize("part", ["uniforms", "Writer", "next_tokens"])
def test_whatever_fails_on_entering_leaves_no_slot_behind(engine: Engine, alone, part: str, monkeypatch):
    going = job(2)
    engine.submit(going)
    engine.round()
    with monkeypatch.context() as patched:
        patched.setattr(f"policypatch.serve.engine.{part}", None)
        bad = job(1)
        engine.submit(bad)
        try:
            engine.round()
        except TypeError:  # where the step for all fails as well, the thread would end them
            assert part == "next_tokens"
    assert bad.tell.why == "error"
    assert len(engine.slots.lengths) == len(engine.running) == 1
    if part != "next_tokens":
        after = job(3)
        answered(engine, [after])
        assert going.written == alone(going) and after.written == alone(after)


def test_short_requests_do_not_keep_the_others_waiting(engine: Engine):
    engine.waiting = 2000
    going = job(2, sampling=Sampling(0.0, 1.0, 50))
    engine.submit(going)
    engine.round()
    for i in range(1000):
        engine.submit(job(i, sampling=Sampling(0.0, 1.0, 1)))
    engine.round()
    assert 300 < len(engine.queue) < 1000 and len(going.written) == 3


def test_those_who_hung_up_do_not_fill_the_queue(engine: Engine):
    waiting = [job(i) for i in range(8)]
    for each in waiting:
        engine.submit(each)
    assert engine.full
    for each in waiting[2:]:
        each.cancelled = True
    assert not engine.full
    engine.submit(job(9))
    assert len(engine.queue) == 3 and {each.tell.why for each in waiting[2:]} == {"cancelled"}


def test_someone_who_cannot_be_told_ends_nothing(engine: Engine, alone):
    def gone(text: str, why: str | None) -> None:
        raise RuntimeError("Event loop is closed")

    bad, good = job(1), job(2)
    bad.tell = gone
    answered(engine, [bad, good])
    assert good.written == alone(good)


def test_a_thread_that_died_is_known(engine: Engine, monkeypatch):
    monkeypatch.setattr(engine, "_work", lambda: None)
    engine.start()
    engine._thread.join()
    assert not engine.alive
    with pytest.raises(BusyError, match="has failed"):
        engine.submit(job())


def test_who_waits_is_told_when_a_device_fails_for_good(engine: Engine, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(engine.slots, "step", fails)
    monkeypatch.setattr(engine.slots, "leave", fails)
    jobs = [job(number) for number in range(engine.slots.rows + 2)]  # two more than are let in
    for each in jobs:
        engine.submit(each)
    engine.start()
    engine._thread.join(60)
    assert not engine.alive and [each.tell.why for each in jobs] == ["error"] * len(jobs)
    with pytest.raises(BusyError, match="has failed"):
        engine.submit(job())


def test_who_comes_while_the_thread_dies_is_refused(engine: Engine, monkeypatch):
    """The queue's last look is over, and the thread is alive still."""

    def fails(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(engine.slots, "step", fails)
    monkeypatch.setattr(engine.slots, "leave", fails)
    first, late, refused = job(1), job(2), []

    def told(text: str, why: str | None) -> None:
        if why is not None:
            assert engine._thread.is_alive() and not engine.alive
            with pytest.raises(BusyError, match="has failed") as caught:
                engine.submit(late)
            refused.append(caught)

    first.tell = told
    engine.submit(first)
    engine.start()
    engine._thread.join(60)
    assert refused and not engine.queue


def test_stacks_that_are_kept_take_bounded_room(engine: Engine):
    engine.roots.room = 10
    for stack in (*STACKS, *STACKS):
        answered(engine, [job(1, stack)])
    assert sum(root.get_seq_length() for root in engine.roots._kept.values()) <= 10


def test_what_prompts_begin_with_is_read_once(engine: Engine, alone, monkeypatch):
    read = []
    entered = type(engine.slots).enter
    monkeypatch.setattr(
        type(engine.slots),
        "enter",
        lambda self, root, tokens: (read.append(len(tokens)), entered(self, root, tokens))[1],
    )
    system = list(range(30, 60))
    prompts = [[*system, 5], [*system, 6, 7], [*system, 8, 9, 10], system, [*system[:20], 3, 4]]
    for stack in ((), ("tox",)):
        jobs = [replace(job(i, stack), prompt=prompt, tell=Told()) for i, prompt in enumerate(prompts)]
        answered(engine, jobs)
        assert [each.written for each in jobs] == [alone(each) for each in jobs]
    assert read == [31, 2, 3, 1, 2] * 2


def test_rotary_frequencies_that_depend_on_the_batch_bound_the_context(tiny_base):
    config = replace(tiny_base).model.config
    old = config.rope_parameters
    try:
        config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 40}
        assert Engine(tiny_base, {}, rows=1).context == 40
    finally:
        config.rope_parameters = old
    assert Engine(tiny_base, {}, rows=1).context == 512
