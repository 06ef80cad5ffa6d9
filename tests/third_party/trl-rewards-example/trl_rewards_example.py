"""A complete trl-rewards plugin: one reward, one shaper."""

from trl_rewards import Reward, Shaper, hookimpl


class Vowels(Reward):
    """Share of vowels among the letters of a completion, in [0, 1]; no opinion on text without letters."""

    vowels: str = "aeiou"
    """Letters that count as vowels, in either case."""

    def score(self, samples):
        return [self.share(text) for text in samples.texts]

    def share(self, text):
        letters = [letter for letter in text.lower() if letter.isalpha()]
        return sum(letter in self.vowels for letter in letters) / len(letters) if letters else None


class Negate(Shaper):
    """The reward with its sign turned."""

    def __call__(self, rewards, samples):
        return -rewards


@hookimpl
def register_rewards():
    return {"vowels": Vowels}


@hookimpl
def register_shapers():
    return {"negate": Negate}
