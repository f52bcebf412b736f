"""The simulation of benchmarks/goodput.py on cases that can be worked out by hand, and the weeks that it is given."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from goodput import WEEK, large, week
from goodput_simulation import Allocation, Cause, Job, Kept, Policy, simulate

JOB = Job(generate=70.0, train=30.0, startup=50.0, save=20.0, stall=5.0, lost_by_kill=10.0)
MILES = Policy("miles", journal=True, listens=True, every=2)
SIGNAL = Policy("signal", journal=False, listens=True, every=2)
NOTHING = Policy("nothing", journal=False, listens=False, every=2)
FOREVER = 1e6


def preempted(told: float, grace: float) -> Allocation:
    return Allocation(0.0, told, told + grace, Cause.PREEMPTED)


def lost(killed: float) -> Allocation:
    return Allocation(0.0, math.inf, killed, Cause.NODE_FAILURE)


def ends(killed: float) -> Allocation:
    return Allocation(0.0, math.inf, killed, Cause.WEEK_OVER)


@pytest.mark.parametrize("policy", [MILES, SIGNAL, NOTHING])
def test_without_interruption_only_the_start_and_stalls_are_lost(policy: Policy) -> None:
    outcome = simulate(JOB, policy, [ends(FOREVER)], steps=4)
    # 50 + 4 x 100 + two stalls, after steps 2 and 4.
    assert outcome.allocated == 460.0
    assert (outcome.steps, outcome.useful, outcome.startup, outcome.saving) == (4, 400.0, 50.0, 10.0)
    assert outcome.goodput == pytest.approx(400 / 460)
    assert (outcome.generated_again, outcome.trained_again) == (0.0, 0.0)


def test_a_kill_in_generation_costs_the_journaled_job_what_was_not_flushed() -> None:
    # Step 3 begins at 50 + 200 + 5 = 255; killed 40 s into its generation, 30 of them are on the disk.
    first = simulate(JOB, MILES, [lost(295.0)]).attempts[0]
    assert first.kept == Kept(saved=2, batches=2, begun=30.0)
    # The next attempt: 50 to start, 40 of generation that are left, 30 of training.
    outcome = simulate(JOB, MILES, [lost(295.0), ends(FOREVER)], steps=3)
    assert outcome.attempts[1].seconds == 120.0
    assert (outcome.generated_again, outcome.trained_again) == (10.0, 0.0)


@pytest.mark.parametrize("policy", [SIGNAL, NOTHING])
def test_a_kill_in_generation_costs_a_job_without_journal_all_of_it(policy: Policy) -> None:
    outcome = simulate(JOB, policy, [lost(295.0), ends(FOREVER)], steps=3)
    assert outcome.attempts[0].kept == Kept(saved=2, batches=2)
    assert outcome.attempts[1].seconds == 150.0
    assert (outcome.generated_again, outcome.trained_again) == (40.0, 0.0)


def test_steps_after_the_checkpoint_are_trained_again_and_not_generated_again() -> None:
    # Step 3 is done at 355, killed in the training of step 4 (425 to 455): its batch is in the journal.
    outcome = simulate(JOB, MILES, [lost(440.0), ends(FOREVER)], steps=4)
    assert outcome.attempts[0].kept == Kept(saved=2, batches=4)
    assert (outcome.attempts[1].replayed, outcome.attempts[1].seconds) == (2, 50.0 + 30.0 + 30.0 + 5.0)
    # Lost: the training of step 3, and 15 s of that of step 4.
    assert (outcome.generated_again, outcome.trained_again) == (0.0, 45.0)


def test_without_journal_the_steps_after_the_checkpoint_are_made_again() -> None:
    outcome = simulate(JOB, SIGNAL, [lost(440.0), ends(FOREVER)], steps=4)
    assert outcome.attempts[1].seconds == 50.0 + 200.0 + 5.0
    assert (outcome.generated_again, outcome.trained_again) == (140.0, 45.0)


def test_a_save_that_the_kill_overtakes_does_not_count() -> None:
    # The save of step 2 begins at 250 and is complete at 270.
    assert simulate(JOB, NOTHING, [lost(269.0)]).attempts[0].kept.saved == 0
    assert simulate(JOB, NOTHING, [lost(270.0)]).attempts[0].kept.saved == 2


def test_told_in_generation_a_job_that_listens_saves_and_leaves() -> None:
    # Told at 370, 15 s into the generation of step 4; nothing is being written, and 60 s are enough for a save.
    journaled, plain = (simulate(JOB, policy, [preempted(370.0, 60.0)]).attempts[0] for policy in (MILES, SIGNAL))
    assert (journaled.seconds, plain.seconds) == (390.0, 390.0)
    assert journaled.kept == Kept(saved=3, batches=3, begun=15.0)
    assert plain.kept == Kept(saved=3, batches=3)
    # One that does not listen dies of the signal.
    deaf = simulate(JOB, NOTHING, [preempted(370.0, 60.0)]).attempts[0]
    assert (deaf.seconds, deaf.kept) == (370.0, Kept(saved=2, batches=2))


def test_with_too_little_grace_the_journal_alone_has_the_last_steps() -> None:
    # 1.5 x 20 s would have to be left.
    journaled, plain = (simulate(JOB, policy, [preempted(370.0, 30.0)]).attempts[0] for policy in (MILES, SIGNAL))
    assert journaled.kept == Kept(saved=2, batches=3, begun=15.0)
    assert plain.kept == Kept(saved=2, batches=2)
    assert journaled.seconds == 370.0


def test_told_in_training_a_job_finishes_it_first() -> None:
    # The training of step 3 lasts from 325 to 355.
    enough = simulate(JOB, MILES, [preempted(340.0, 60.0)]).attempts[0]
    assert (enough.step, enough.seconds, enough.kept) == (3, 375.0, Kept(saved=3, batches=3))
    short = simulate(JOB, MILES, [preempted(340.0, 10.0)]).attempts[0]
    assert (short.step, short.seconds, short.kept) == (2, 350.0, Kept(saved=2, batches=3))


def test_told_while_a_save_is_written_it_waits_for_it() -> None:
    # Step 2 is saved from 250 to 270; told at 260.
    spent = simulate(JOB, MILES, [preempted(260.0, 60.0)]).attempts[0]
    assert (spent.seconds, spent.kept) == (270.0, Kept(saved=2, batches=2, begun=5.0))
    assert spent.saving == pytest.approx(5.0 + 10.0)


def test_before_its_time_limit_a_job_leaves_itself_the_time_of_a_save() -> None:
    # Slurm tells 20 s before the end, Miles goes 10 + 2 x 20 s before it: at 370.
    limit = Allocation(0.0, 400.0, 420.0, Cause.TIME_LIMIT)
    listens = simulate(JOB, MILES, [limit]).attempts[0]
    assert (listens.seconds, listens.kept) == (390.0, Kept(saved=3, batches=3, begun=15.0))
    # Nobody tells one that does not listen.
    assert simulate(JOB, NOTHING, [limit]).attempts[0].seconds == 420.0


def test_an_allocation_that_is_shorter_than_the_start_leaves_everything_as_it_was() -> None:
    outcome = simulate(JOB, MILES, [lost(295.0), lost(20.0), preempted(30.0, 60.0), ends(FOREVER)], steps=3)
    assert [attempt.seconds for attempt in outcome.attempts] == [295.0, 20.0, 30.0, 120.0]
    assert outcome.startup == 50.0 + 20.0 + 30.0 + 50.0


def test_the_automatic_interval_saves_after_the_first_step_and_then_by_its_stall() -> None:
    auto = Policy("auto", journal=False, listens=False, every=None)
    # Daly's interval for a stall of 5 s and the prior of 12 h alone is 654 s: 7 steps.
    spent = simulate(JOB, auto, [ends(FOREVER)], steps=9).attempts[0]
    assert spent.saving == 10.0
    # The second save, after step 8, has begun at 855 and is complete at 875.
    assert simulate(JOB, auto, [lost(874.0)]).attempts[0].kept.saved == 1
    assert simulate(JOB, auto, [lost(875.0)]).attempts[0].kept.saved == 8


def test_no_automatic_save_begins_while_one_is_written() -> None:
    slow = Job(generate=70.0, train=30.0, startup=50.0, save=1000.0, stall=0.01)
    auto = Policy("auto", journal=False, listens=False, every=None)
    # Daly's interval is 29 s, the first save is complete at 150 + 1000: the second begins after step 12, at 1250.
    spent = simulate(slow, auto, [ends(1300.0)]).attempts[0]
    assert (spent.kept.saved, spent.saving) == (1, pytest.approx(0.02))


def test_with_a_journal_the_automatic_interval_is_longer() -> None:
    auto = Policy("auto", journal=True, listens=False, every=None)
    # Three tenths of a step are done again after a failure: sqrt(1 / 0.3) times as long, 1198 s, and the
    # attempt's own seconds without a failure make it a little longer: 13 steps.
    assert simulate(JOB, auto, [lost(1300.0)]).attempts[0].kept.saved == 1
    assert simulate(JOB, auto, [lost(1500.0)]).attempts[0].kept.saved == 14


@pytest.mark.parametrize("seed", range(5))
def test_more_grace_and_a_journal_never_do_harm(seed: int) -> None:
    allocations = week(random.Random(seed), nodes=4, preemption_hours=2.0, limit_hours=4.0, grace=10.0)
    longer = [
        replace(each, killed=each.killed + 120.0) if each.cause is Cause.PREEMPTED else each for each in allocations
    ]
    for policy in (MILES, SIGNAL):
        assert simulate(JOB, policy, longer).steps >= simulate(JOB, policy, allocations).steps
    assert simulate(JOB, MILES, allocations).steps >= simulate(JOB, SIGNAL, allocations).steps


def test_what_was_spent_adds_up() -> None:
    allocations = [lost(295.0), preempted(500.0, 10.0), preempted(700.0, 60.0), ends(2000.0)]
    for policy in (MILES, SIGNAL, NOTHING):
        outcome = simulate(JOB, policy, allocations)
        again = outcome.generated_again + outcome.trained_again
        assert outcome.useful + outcome.startup + outcome.saving + again == pytest.approx(outcome.allocated)
        assert outcome.generated_again >= 0 and outcome.trained_again >= 0


@pytest.mark.parametrize("hours", [1.0, 8.0, math.inf])
def test_a_week_ends_and_its_allocations_do_not_overlap(hours: float) -> None:
    found = week(random.Random(1), nodes=16, preemption_hours=hours, limit_hours=4.0, grace=30.0)
    assert found == week(random.Random(1), nodes=16, preemption_hours=hours, limit_hours=4.0, grace=30.0)
    assert found[-1].started + found[-1].killed <= WEEK
    for before, after in pairwise(found):
        assert before.started + before.killed < after.started
    assert all(each.killed <= 4 * 3600 + 30 for each in found)
    assert (Cause.PREEMPTED in {each.cause for each in found}) is math.isfinite(hours)


def test_interruptions_come_as_often_as_asked_for() -> None:
    weeks = [week(random.Random(n), nodes=1000, preemption_hours=3.0, limit_hours=1e4, grace=30.0) for n in range(40)]
    seconds = sum(each.killed for found in weeks for each in found)
    causes = [each.cause for found in weeks for each in found]
    # 40 weeks: about 2000 preemptions and 1000 failures; 419 failures on 2048 nodes in 54 days.
    assert causes.count(Cause.PREEMPTED) / seconds == pytest.approx(1 / (3 * 3600), rel=0.1)
    assert causes.count(Cause.NODE_FAILURE) / seconds == pytest.approx(1000 * 419 / 2048 / 54 / 86400, rel=0.1)


def test_sizes_of_large_jobs_follow_from_their_parameters() -> None:
    size = large("30B", billions=30, nodes=4, step=192.0, published="", gb_per_second=5)
    assert (size.job.save, size.job.startup) == (84.0, 384.0)
    assert size.job.step == pytest.approx(192.0)
    assert size.job.stall == pytest.approx(84 * 6.3 / 148.8)
