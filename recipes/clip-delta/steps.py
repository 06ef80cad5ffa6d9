"""Steps of the bundled policy's replies, and a script in place of a process reward model."""

from trl_rewards_process.factors import equations

from trl_rewards import StepReward


class Unfaulted(StepReward):
    """0.1 for a step with a wrong sum in it, 0.9 for any other, also one that says nothing new or nothing at all.

    Like a process reward model it finds steps right or wrong, and does not ask what they are for.
    """

    def score_steps(self, samples, steps):
        return [[0.1 if sum_of < 0 else 0.9 for (sum_of,) in equations("", row)] for row in steps]


class Count(StepReward):
    """1.0 for each step."""

    def score_steps(self, samples, steps):
        return [[1.0] * len(row) for row in steps]
