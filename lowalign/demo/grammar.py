"""The grammar of the tiny world: its words, its postcards, and the pages that the base is pretrained on."""

import itertools
import random
from collections.abc import Callable

_PLACES = """
Amsterdam Athens Baku Bali Barcelona Bergen Berlin Bombay Boston Bremen Brighton Cadiz Cairo Chicago Cologne Cork
Corfu Delhi Dover Dublin Florence Geneva Genoa Ghent Glasgow Granada Hamburg Havana Helsinki Istanbul Kyoto Lagos
Leipzig Lima Lisbon London Lyon Madrid Malta Marseille Milan Montreal Munich Nairobi Nantes Naples Osaka Oslo
Paris Porto Prague Quito Riga Rome Salzburg Seville Sydney Tokyo Tunis Turin Venice Vienna Warsaw York
"""
PLACES = tuple(_PLACES.split())
"""Every place of the world."""

MOODS = {
    1.0: ("wonderful", "splendid", "marvellous", "glorious"),
    0.75: ("nice", "pleasant", "good", "fine"),
    0.5: ("plain", "simple", "normal", "typical"),
    0.25: ("dull", "poor", "dreary", "boring"),
    0.0: ("horrible", "terrible", "dreadful", "miserable"),
}
"""Cheerfulness of a sentence -> the mood words that give it."""

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Ida", "Jack", "Laura", "Tom")
SIGHTS = ("harbour", "market", "river", "bridge", "museum", "garden", "church", "castle", "square", "tower", "beach")
THINGS = ("food", "weather", "music", "hotel", "view", "tea", "bread", "light")
OUTINGS = ("breakfast", "lunch", "dinner", "walk", "swim", "concert", "boat trip", "train ride")
PEOPLE = ("waiters", "children", "guides", "neighbours", "sailors", "shop assistants", "users of the library")
HOLIDAY = ("room", "taxi", "guide", "day", "evening", "picnic")
TIMES = ("today", "yesterday", "this morning", "last night")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LUGGAGE = ("a hat", "two books", "a map", "warm socks", "a camera", "stamps", "an umbrella", "a pen", "soap", "a lamp")

GREETINGS = tuple(f"Dear {name}," for name in NAMES)
CLOSINGS = tuple(f"{word}, {name}" for word in ("Love", "Yours") for name in NAMES)
OPENERS = ("Greetings from {}.", "I am writing from {}.", "We are in {} now.", "Hello from {}.")

# (form, values for {0}, values for {1}); {mood} takes a word of MOODS.
SENTENCE_FORMS = (
    ("The {0} is {mood}.", SIGHTS + THINGS, ("",)),
    ("We had a {mood} {0} {1}.", OUTINGS, TIMES),
    ("The {0} are {mood} company.", PEOPLE, ("",)),
    ("We saw a {mood} {0} {1}.", SIGHTS, TIMES),
    ("Our {0} was {mood}.", HOLIDAY, ("",)),
    ("{0} is {mood} this {1}.", PLACES, ("spring", "summer", "autumn", "winter")),
    ("The {1} of {0} is {mood}.", PLACES, SIGHTS),
    ("We find {0} {mood} {1}.", PLACES, ("so far", "at night", "in the rain")),
)

ABOUT_PLACES = tuple(entry for entry in SENTENCE_FORMS if entry[1] is PLACES)

CHEERFULNESS = {
    form.format(first, second, mood=word): value
    for form, firsts, seconds in SENTENCE_FORMS
    for first, second in itertools.product(firsts, seconds)
    for value, words in MOODS.items()
    for word in words
}
"""Every sentence the grammar can write in the body of a postcard -> its cheerfulness."""

FRAME = frozenset((*GREETINGS, *CLOSINGS, *(opener.format(place) for opener in OPENERS for place in PLACES)))
"""Lines and sentences of a postcard that carry no mood."""


def postcard(rng: random.Random, place: str, sentences: int | None = None) -> str:
    """A postcard from `place` to a friend, in a random mood; three or four body sentences by default."""
    body = [rng.choice(OPENERS).format(place), *mood_sentences(rng, place, sentences or rng.choice((3, 4)))]
    return f"{rng.choice(GREETINGS)}\n{' '.join(body)}\n{rng.choice(CLOSINGS)}"


def mood_sentences(rng: random.Random, place: str, n: int, forms: tuple = SENTENCE_FORMS) -> list[str]:
    """`n` different sentences about `place` around one mood, each at most one step of the five away from it."""
    moods = list(MOODS.values())
    middle = rng.randrange(len(moods))
    sentences: dict[str, None] = {}
    while len(sentences) < n:
        words = moods[min(max(middle + rng.choice((-1, 0, 0, 1)), 0), len(moods) - 1)]
        form, firsts, seconds = rng.choice(forms)
        first = place if firsts is PLACES else rng.choice(firsts)
        sentences[form.format(first, rng.choice(seconds), mood=rng.choice(words))] = None
    return list(sentences)


def pretraining_text(n: int, seed: int) -> list[str]:
    """`n` pages of raw text, one document each: post boxes, diaries, guides, lists, and loose sheets of anything.

    The heading of a page decides what follows. In answered post a card comes from the place of the request before it; in
    lost post and on loose sheets from any place. Under a heading with "one" the page ends after one item.
    So the base can follow a request and can stop, but does neither without such a heading.
    """
    rng = random.Random(f"pages {seed}")
    return [_page(rng) for _ in range(n)]


def _page(rng: random.Random) -> str:
    kind, items = rng.choice(PAGES)
    single = bool(kind) and rng.random() < 0.4
    parts = [rng.choice(items)(rng) for _ in range(1 if single else rng.randint(4, 9))]
    heading = [f"{kind} of {rng.choice(NAMES)}, {'one' if single else 'many'}."] if kind else []
    return "\n\n".join(heading + parts)


def _card(rng: random.Random) -> str:
    return postcard(rng, rng.choice(PLACES))


def _request(rng: random.Random) -> str:
    return rng.choice(REQUESTS).format(rng.choice(PLACES), rng.choice(NAMES))


def _answered(rng: random.Random) -> str:
    place = rng.choice(PLACES)
    return f"{rng.choice(REQUESTS).format(place, rng.choice(NAMES))}\n\n{postcard(rng, place)}"


def _lost(rng: random.Random) -> str:
    return f"{_request(rng)}\n\n{_card(rng)}"


def _diary_entry(rng: random.Random) -> str:
    place = rng.choice(PLACES)
    return f"{rng.choice(DAYS)}, {place}. {' '.join(mood_sentences(rng, place, rng.choice((2, 3, 4))))}"


def _guide(rng: random.Random) -> str:
    place = rng.choice(PLACES)
    return f"Guide to {place}. {' '.join(mood_sentences(rng, place, rng.choice((3, 4, 5)), ABOUT_PLACES))}"


def _list(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"To pack: {', '.join(rng.sample(LUGGAGE, 4))}."
    return f"To see in {rng.choice(PLACES)}: the {', the '.join(rng.sample(SIGHTS, 4))}."


REQUESTS = (
    "{1} wants a postcard from {0}.",
    "Note to {1}: write home from {0}.",
    "A card from {0} for {1}, please.",
    "Please send {1} a postcard.\nFrom {0}.",
    "{1}, when you are in {0}, write me a card.",
    "You are in {0}. Write to {1} now.",
    "I want {1} to write from {0}.",
)

# (heading, empty for pages without one; what the page may contain)
PAGES: tuple[tuple[str, tuple[Callable[[random.Random], str], ...]], ...] = (
    ("Answered post", (_answered,)),
    ("Lost post", (_lost,)),
    ("Guide", (_guide,)),
    ("Diary", (_diary_entry,)),
    ("", (_guide, _diary_entry)),
    ("", (_card, _request, _diary_entry, _list)),
    ("", (_card, _request)),
)
