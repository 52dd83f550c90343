"""What a text says about itself: its language, and whether it refuses. Word lists, no model: fast, and wrong now and then."""

import re
import unicodedata
from collections import Counter

SHORTEST = 12  # letters that a language needs
LEAST_SHARE = 0.12  # of the words that are stop words
CODE, CODE_SHARE = frozenset("{}[]()=;<>_+*/\\|&$#"), 0.1  # of the characters that are no white space
SCRIPTS = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "CYRILLIC": "Cyrillic", "ARABIC": "Arabic", "HEBREW": "Hebrew",
    "GREEK": "Greek", "DEVANAGARI": "Devanagari", "BENGALI": "Bengali", "THAI": "Thai", "TAMIL": "Tamil", "ARMENIAN": "Armenian",
    "GEORGIAN": "Georgian",
}  # fmt: skip
STOP_WORDS = {
    "en": "the of and to in is that it you for was with are this have not be at by from they which what can your will as or an on",
    "de": "der die das und ist nicht ein eine zu den mit sich auf für im dem von wird sind auch als es sie ich wie oder aus bei",
    "fr": "le la les des et est une dans que pour qui pas sur avec ce il par plus sont au du vous nous mais ou être cette elle",
    "es": "el la los las de que y en un una es por con para no se del al lo como más pero su sus este está son o cuando",
    "it": "il di che la e è un una per non sono con del della dei le si da al come più ma anche questo gli nel alla o",
    "pt": "o a os as de que e do da em um uma para com não por dos das no na se mais como mas é ao ou são você foi",
    "nl": "de het een en van is dat op te in niet zijn met voor die aan er om ook als bij maar naar wordt je dan of deze",
    "pl": "i w na nie się z do jest to że o jak ale po co za od przez są oraz dla czy lub być może tym który ich",
    "sv": "och att det i en på är som för av med inte den till har de ett om men var sig så kan eller när från vi du",
    "tr": "ve bir bu da de için ile çok olarak daha ne gibi var olan sonra en kadar ama her mi değil o ya ki veya",
}  # fmt: skip
_STOP = {language: frozenset(word for word in words.split() if len(word) > 1) for language, words in STOP_WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")
REFUSAL = re.compile(
    r"\b(?:i(?:'|’)?m sorry,? (?:but )?(?:i|as an)|i am sorry,? but i|i apologi[sz]e,? but i|sorry,? (?:but )?i (?:can|am|'m)|"
    r"i (?:can(?:'|’)t|cannot|can not|won(?:'|’)t|will not|am not able to|am unable to|must decline|must refuse)"
    r" (?:help|assist|provide|do that|comply|fulfil|answer|create|write|generate|give|offer|support|share|engage|participate|in good)|"
    r"i(?:'|’)m (?:not able|unable) to|(?:as|i am|i(?:'|’)m) an? (?:ai|artificial intelligence|language model)\b[^.!?\n]{0,80}"
    r"(?:can(?:'|’)?t|cannot|not able|unable|don(?:'|’)t|do not)|it (?:is|would be) (?:not |un|in)(?:appropriate|ethical|legal) to|"
    r"against my (?:programming|guidelines|principles)|i decline\b|(?:no puedo|lo siento, pero)|(?:je suis désolé|je ne peux pas)|"
    r"(?:es tut mir leid,? aber|ich kann (?:dir|ihnen|das|dabei|diese)[^.!?\n]{0,40}nicht))",
    re.IGNORECASE,
)
REFUSAL_START = 250  # characters in which a refusal begins


def language_of(text: str) -> str:
    """A two-letter code; the name of a script where that is all the letters say; "code"; or "unknown": too short, or none of
    these."""
    dense = "".join(text.split())
    if len(dense) >= SHORTEST and sum(map(CODE.__contains__, dense)) > CODE_SHARE * len(dense):
        return "code"
    letters = [letter for letter in text if letter.isalpha()]
    if len(letters) < SHORTEST and not any(letter > "\u2e80" for letter in letters):
        return "unknown"
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in letters[:400])
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts["CJK"] and scripts["CJK"] > 0:
        return "ja"
    most = scripts.most_common(1)[0][0] if scripts else "?"
    if most != "LATIN":
        return SCRIPTS.get(most, "unknown")
    words = [word for word in _WORD.findall(text.lower()) if len(word) > 1]  # a single letter may be code
    hits = {language: sum(word in own for word in words) for language, own in _STOP.items()}
    best, second = sorted(hits, key=lambda language: -hits[language])[:2]
    enough = hits[best] >= 2 and hits[best] >= LEAST_SHARE * len(words) and hits[best] > hits[second]
    return best if enough else "unknown"


def refuses(answer: str) -> bool:
    """Whether an answer begins with a refusal, by phrases of English, and a few of German, French and Spanish."""
    return REFUSAL.search(answer.strip()[:REFUSAL_START]) is not None
