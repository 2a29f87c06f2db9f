"""Words that contexts are made of: filler sentences, and names that are never given twice."""

from __future__ import annotations

import random
from collections.abc import Iterator

#: The filler of RULER and of ∞-Bench. Nothing in it can be the answer to a question.
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def listed(words: str) -> list[str]:
    return words.split()


_ADJECTIVES = listed(
    "amber ancient autumn bitter blue bold brave brief bright broad bronze calm careful cheerful clever cold cosmic "
    "crimson curious daring deep distant dusty eager early eastern elegant empty endless faint famous fancy fierce "
    "flat fragile fresh frosty gentle giant golden graceful grand green happy heavy hidden hollow honest humble icy "
    "idle jolly keen kind late lazy light lively lonely loud lucky marble mellow mighty misty modern narrow noble "
    "northern odd patient plain polite proud purple quick quiet rapid rare red restless rough royal rusty sacred "
    "scarlet secret sharp shiny shy silent silver simple sleepy slow small smooth solid southern square stormy "
    "strong sunny sweet swift tall tender thin tidy tiny velvet violet warm western wide wild winter wise young"
)
_NOUNS = listed(
    "acorn anchor apple arrow badger barrel basket beacon bear beetle bell bird boat bridge bucket butterfly cabin "
    "camel candle canyon castle cave cedar cherry circle cliff cloud comet copper coral crane creek crown desert "
    "dolphin dragon drum eagle engine falcon feather fern field flame flower forest fountain fox garden glacier "
    "hammer harbor hawk hill horse island jacket jungle kettle kite ladder lagoon lake lamp lantern leaf lemon "
    "lion maple meadow mirror monkey moon mountain ocean olive orchard otter owl panda paper parrot pebble pencil "
    "piano pine planet pond prairie rabbit raven ribbon river rocket rose saddle sail shadow shell shore spark "
    "spider spring star stone stream summit sun table temple thunder tiger tower train tree tulip tunnel turtle "
    "valley village violin wagon wave whale willow window wolf"
)


def names(rng: random.Random) -> Iterator[str]:
    """Names such as "amber-falcon", no name twice. Once two words are scarce, some have three or more."""
    given = set()
    while True:
        name = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
        while name in given:
            name = f"{rng.choice(_ADJECTIVES)}-{name}"
        given.add(name)
        yield name
