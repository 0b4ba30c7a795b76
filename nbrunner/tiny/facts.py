"""What the bundled model is taught: plain tables, free of any text around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attribute = Literal["capital", "language", "currency", "continent"]
ATTRIBUTES: tuple[Attribute, ...] = ("capital", "language", "currency", "continent")


@dataclass(frozen=True)
class Country:
    """One country. Where a country has several languages, the one most people there use."""

    name: str
    capital: str
    language: str
    currency: str
    continent: str

    def value(self, attribute: Attribute) -> str:
        values: dict[Attribute, str] = {
            "capital": self.capital,
            "language": self.language,
            "currency": self.currency,
            "continent": self.continent,
        }
        return values[attribute]


# Left out on purpose: countries on two continents, with a disputed capital, or whose name needs an article.
_COUNTRIES = """
France|Paris|French|euro|Europe
Italy|Rome|Italian|euro|Europe
Spain|Madrid|Spanish|euro|Europe
Germany|Berlin|German|euro|Europe
Poland|Warsaw|Polish|zloty|Europe
Norway|Oslo|Norwegian|krone|Europe
Sweden|Stockholm|Swedish|krona|Europe
Denmark|Copenhagen|Danish|krone|Europe
Iceland|Reykjavik|Icelandic|krona|Europe
Finland|Helsinki|Finnish|euro|Europe
Greece|Athens|Greek|euro|Europe
Austria|Vienna|German|euro|Europe
Hungary|Budapest|Hungarian|forint|Europe
Ireland|Dublin|English|euro|Europe
Portugal|Lisbon|Portuguese|euro|Europe
Ukraine|Kyiv|Ukrainian|hryvnia|Europe
Romania|Bucharest|Romanian|leu|Europe
Croatia|Zagreb|Croatian|euro|Europe
Czechia|Prague|Czech|koruna|Europe
Serbia|Belgrade|Serbian|dinar|Europe
Albania|Tirana|Albanian|lek|Europe
Estonia|Tallinn|Estonian|euro|Europe
Latvia|Riga|Latvian|euro|Europe
Lithuania|Vilnius|Lithuanian|euro|Europe
Japan|Tokyo|Japanese|yen|Asia
China|Beijing|Chinese|yuan|Asia
India|New Delhi|Hindi|rupee|Asia
Iran|Tehran|Persian|rial|Asia
Iraq|Baghdad|Arabic|dinar|Asia
Nepal|Kathmandu|Nepali|rupee|Asia
Thailand|Bangkok|Thai|baht|Asia
Vietnam|Hanoi|Vietnamese|dong|Asia
South Korea|Seoul|Korean|won|Asia
Mongolia|Ulaanbaatar|Mongolian|tugrik|Asia
Malaysia|Kuala Lumpur|Malay|ringgit|Asia
Pakistan|Islamabad|Urdu|rupee|Asia
Bangladesh|Dhaka|Bengali|taka|Asia
Cambodia|Phnom Penh|Khmer|riel|Asia
Egypt|Cairo|Arabic|pound|Africa
Kenya|Nairobi|Swahili|shilling|Africa
Ghana|Accra|English|cedi|Africa
Nigeria|Abuja|English|naira|Africa
Morocco|Rabat|Arabic|dirham|Africa
Tunisia|Tunis|Arabic|dinar|Africa
Ethiopia|Addis Ababa|Amharic|birr|Africa
Senegal|Dakar|French|franc|Africa
Angola|Luanda|Portuguese|kwanza|Africa
Canada|Ottawa|English|dollar|North America
Mexico|Mexico City|Spanish|peso|North America
Cuba|Havana|Spanish|peso|North America
Jamaica|Kingston|English|dollar|North America
Brazil|Brasilia|Portuguese|real|South America
Peru|Lima|Spanish|sol|South America
Chile|Santiago|Spanish|peso|South America
Argentina|Buenos Aires|Spanish|peso|South America
Colombia|Bogota|Spanish|peso|South America
Australia|Canberra|English|dollar|Oceania
New Zealand|Wellington|English|dollar|Oceania
"""
COUNTRIES: tuple[Country, ...] = tuple(Country(*row.split("|")) for row in _COUNTRIES.split("\n") if row)

# No word stands in two pairs: its opposite would be a coin toss.
_OPPOSITES = """hot cold|big small|up down|left right|day night|black white|open closed|happy sad|fast slow
|old young|rich poor|long short|high low|full empty|wet dry|hard soft|early late|near far|strong weak|light dark
|good bad|first last|true false|loud quiet|clean dirty|thick thin|wide narrow|inside outside|above below
|before after|summer winter|north south|east west|love hate|yes no|buy sell|win lose|push pull|begin end"""
OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    (a, b) for a, b in (pair.split() for pair in _OPPOSITES.replace("\n", "").split("|"))
)

_PLURALS = """cat cats|dog dogs|book books|apple apples|house houses|tree trees|car cars|bird birds|hat hats
|cup cups|lamp lamps|star stars|box boxes|fox foxes|bus buses|glass glasses|dish dishes|watch watches|city cities
|baby babies|story stories|berry berries|leaf leaves|wolf wolves|knife knives|child children|man men
|woman women|mouse mice
|foot feet|tooth teeth|goose geese|sheep sheep|fish fish"""
PLURALS: tuple[tuple[str, str], ...] = tuple(
    (one, many) for one, many in (pair.split() for pair in _PLURALS.replace("\n", "").split("|"))
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_word(number: int) -> str:
    """English for 0 to 100 (``21`` gives ``"twenty-one"``).

    Raises
    ------
    ValueError
        Outside 0 to 100.
    """
    if not 0 <= number <= 100:
        raise ValueError(f"number_word knows 0 to 100, not {number}")
    if number < 20:
        return _ONES[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
