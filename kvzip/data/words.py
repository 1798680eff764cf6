"""Word lists and a syllable generator, each with disjoint train and test parts."""

from __future__ import annotations

import random
import zlib
from functools import lru_cache
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


def listed(text: str) -> tuple[str, ...]:
    """Split a list at bars and line ends, or at white space where there are no bars."""
    items = text.replace("\n", "|").split("|") if "|" in text else text.split()
    return tuple(item for item in items if item)


FIRST_NAMES = listed(
    """
Aaron Abel Abigail Ada Adam Adele Adrian Agnes Ahmed Aidan Aisha Alan Albert Alice Alina Alma Amara Amelia
Amir Amos Ana Andre Andrea Angela Anika Anita Anna Anton Anya Arthur Asha Astrid Aurora Austin Axel Barbara
Basil Beatrice Ben Benito Bernard Bianca Boris Brenda Brian Bruno Calvin Camila Carl Carla Carmen Caroline
Cecil Celia Chandra Charles Chloe Clara Claude Clement Conrad Cora Cyrus Daisy Damian Daniel Daphne Dara
David Deborah Delia Dennis Diana Diego Dmitri Dolores Dominic Dora Doris Duncan Dylan Edgar Edith Edmund
Elena Eli Elias Elisa Ella Ellen Elsa Emil Emilia Emma Enzo Eric Erika Ernest Esther Ethan Eugene Eva Fabian
Faith Farah Fatima Felix Fiona Flora Frances Frank Freda Gabriel Gail George Gerald Gina Gloria Gordon Grace
Greta Guido Gustav Gwen Hakim Hannah Harold Harriet Hasan Hazel Hector Helen Helga Henry Hilda Holly Hugo
Ian Ibrahim Ida Igor Imani Ines Ingrid Irene Iris Isaac Isabel Ivan Ivy Jacob Jada James Jana Jane Jasper
Javier Jean Jenna Jerome Joan Joel Johan Jonas Jorge Joseph Joyce Juan Judith Julia Julian June Kai Karen
Karim Karl Kate Keiko Keith Kenji Kevin Kira Klaus Kofi Lara Lars Laura Leah Leila Lena Leo Leon Lewis Lidia
Lila Linda Lionel Liam Lola Lorenzo Louis Louisa Lucas Lucia Luis Luna Lydia Mabel Magnus Malik Manuel Mara
Marco Margaret Maria Marian Mario Marta Martin Mary Mateo Matilda Maud Maurice Max Maya Megan Mei Mercy
Miguel Mila Milan Milo Mina Miriam Mohan Mona Monica Nadia Nancy Naomi Natalia Nathan Neil Nell Nia Nicholas
Nico Nina Noah Noel Nora Norman Odette Olga Oliver Olivia Omar Oscar Otto Pablo Pamela Patrick Paul Paula
Pearl Pedro Penny Peter Petra Philip Phoebe Pierre Priya Quentin Rachel Rafael Rahul Ralph Ramona Ravi
Raymond Rebecca Regina Rene Rhoda Richard Rita Robert Robin Rodrigo Roger Roland Rosa Rosalind Rose Ruben
Rufus Ruth Sadie Salma Samir Samuel Sandra Sara Saul Sergei Seth Sheila Silas Silvia Simon Sofia Sonia
Stefan Stella Susan Sven Sylvia Tamara Tara Tariq Teresa Thea Theo Thomas Tobias Tomas Tove Tristan Ursula
Valerie Vanessa Vera Victor Vincent Viola Violet Vivian Wallace Walter Wanda Wendy Wilma Winston Yara Yasmin
Yolanda Yuki Yusuf Yvonne Zachary Zara Zelda Zoe
"""
)

SURNAMES = listed(
    """
Abbott Acosta Adler Alvarez Andersen Archer Ashby Atkins Bailey Baker Banerjee Barlow Barnes Bauer Becker
Bell Bennett Berg Bishop Blake Bloom Boyd Brandt Brennan Brooks Burke Burns Byrne Cabrera Calder Carver
Castillo Chan Chavez Cho Clarke Cole Conti Cooper Costa Crane Cruz Dalton Daly Davies Delgado Diaz Dixon
Doyle Drake Duarte Dubois Dunn Eaton Ellis Engel Espinoza Farrell Ferrari Fischer Flores Ford Foster Fox
Franco Frost Fuentes Garcia Garner Gibson Gomez Graham Gray Greco Green Grimes Gupta Haas Hale Hall Hansen
Harper Hayes Hendricks Herrera Hoffman Holt Hughes Hunt Ibarra Ito Jansen Jensen Johnson Jordan Joshi Kane
Kapoor Keller Kelly Kennedy Khan Kim Klein Knight Koch Kumar Lambert Larsen Lee Leone Lim Lindgren Lopez
Lowe Lund Mahler Malone Mancini Marino Marsh Mason Mehta Mendez Mercer Meyer Miller Molina Moore Morales
Moreno Moretti Morgan Moss Mueller Murphy Nair Navarro Neumann Nguyen Nielsen Nolan Norris Novak Oakley
Ocampo Okafor Olsen Ortega Osborne Owens Palmer Park Parker Patel Pearce Peralta Perez Petrov Pierce Porter
Quinn Ramirez Ramos Reed Reyes Rhodes Ricci Rivera Roberts Romano Rossi Rowe Russo Salazar Sanders Santos
Sato Schmidt Schubert Sharma Shaw Silva Singh Sloan Soto Stein Stone Suarez Sutton Suzuki Tanaka Taylor
Thorne Torres Tran Turner Vance Vargas Vega Vogel Wagner Walker Walsh Wang Ward Watts Weber Wells West Wolf
Wong Wright Yates Young Zhang Zimmer
"""
)

CITIES = listed(
    """
Accra|Adelaide|Algiers|Almaty|Amsterdam|Ankara|Antwerp|Athens|Auckland|Baku|Bangkok|Barcelona|Basel|Beirut
Belgrade|Bergen|Berlin|Bern|Bilbao|Bogota|Bologna|Bordeaux|Boston|Bratislava|Bremen|Brisbane|Bristol|Brno
Brussels|Bucharest|Budapest|Buenos Aires|Cairo|Calgary|Cape Town|Caracas|Cardiff|Casablanca|Chicago|Cologne
Copenhagen|Cork|Dakar|Dallas|Damascus|Delhi|Denver|Detroit|Dresden|Dublin|Durban|Edinburgh|Fargo|Florence
Frankfurt|Geneva|Genoa|Ghent|Glasgow|Granada|Graz|Hamburg|Hanoi|Harare|Havana|Helsinki|Houston|Istanbul
Jakarta|Karachi|Kiev|Kigali|Kingston|Krakow|Kyoto|Lagos|Lahore|Leeds|Leipzig|Lille|Lima|Lisbon|Liverpool
London|Luanda|Lusaka|Lyon|Madrid|Malaga|Manchester|Manila|Marseille|Melbourne|Memphis|Mexico City|Miami
Milan|Minsk|Montreal|Moscow|Mumbai|Munich|Nairobi|Nantes|Naples|New York|Nice|Odessa|Oslo|Ottawa|Oxford
Palermo|Panama City|Paris|Perth|Phoenix|Pisa|Porto|Prague|Quebec|Quito|Reykjavik|Riga|Rome|Rotterdam
Salzburg|San Diego|San Jose|Santiago|Sao Paulo|Sarajevo|Seattle|Seoul|Seville|Shanghai|Singapore|Sofia
Stockholm|Stuttgart|Sydney|Taipei|Tallinn|Tampere|Tbilisi|Tehran|Tirana|Tokyo|Toledo|Toronto|Toulouse
Trieste|Tucson|Tunis|Turin|Utrecht|Valencia|Vancouver|Venice|Verona|Vienna|Vilnius|Warsaw|Wellington|Yerevan
York|Zagreb|Zurich
"""
)

JOBS = listed(
    """
accountant|actor|animal trainer|architect|archivist|art dealer|astronomer|baker|bank clerk|barber|beekeeper
bookbinder|bookseller|botanist|bricklayer|bus driver|butcher|carpenter|cartographer|cellist|chef|chemist
clockmaker|coach|cobbler|composer|computer engineer|cook|courier|crane operator|dancer|data analyst|dentist
designer|diver|doctor|editor|electrician|engineer|falconer|farmer|film critic|firefighter|fisherman|florist
forest ranger|gardener|geologist|glassblower|goldsmith|guide|hairdresser|harbour pilot|historian
ice cream maker|illustrator|inspector|interpreter|jeweller|journalist|judge|landscape painter|lawyer
lecturer|librarian|lifeguard|lighthouse keeper|locksmith|mail carrier|marine biologist|mason|mathematician
mechanic|midwife|miner|musician|night guard|notary|novelist|nurse|optician|organist|orthodontist|painter
pharmacist|photographer|physicist|piano tuner|pilot|plumber|poet|police officer|potter|printer|professor
programmer|puppeteer|radio host|roofer|sailor|sculptor|secretary|shepherd|shoemaker|singer|ski coach
social worker|sound engineer|statistician|stonemason|surgeon|surveyor|tailor|tax adviser|taxi driver|teacher
technician|tour guide|train driver|translator|tree surgeon|truck driver|undertaker|usher|veterinarian
violinist|waiter|watchmaker|weaver|web developer|welder|wine maker|writer|yoga teacher|zookeeper|zoologist
"""
)

FOODS = listed(
    """
apple pie|baked beans|banana bread|barley soup|beef stew|blue cheese|bread pudding|brown rice|carrot cake
cherry tart|chicken curry|corn bread|cucumber salad|dark chocolate|fish pie|fried noodles|garlic bread
ginger cake|goulash|grilled trout|honey cake|hot soup|lamb stew|lasagna|lemon pie|lentil soup|mango rice
meat balls|mushroom soup|mushroom risotto|noodle soup|olive bread|onion soup|orange cake|paella|pancakes
pea soup|peach tart|pickled herring|pizza|plum cake|potato salad|pumpkin pie|ramen|ratatouille|red lentils
rice pudding|roast duck|rye bread|sausages|seaweed salad|spinach pie|spring rolls|steamed fish
strawberry jam|sushi|sweet potatoes|tacos|tomato soup|walnut bread
"""
)

ANIMALS = listed(
    """
badger bat bear beaver bison canary cat cow crab crow deer dog donkey dove duck eagle falcon ferret finch
fox frog gecko goat goose hamster hare hawk hedgehog heron horse iguana kestrel lamb lizard llama lynx
magpie mole moose mouse newt otter owl ox parrot pigeon pony puffin rabbit raven robin salmon seal sheep
shrew snail sparrow spider squirrel stork swan tortoise trout turtle walrus weasel whale wolf wren zebra
"""
)

COLORS = listed(
    """
amber black blue bronze brown copper coral crimson cyan golden gray green indigo ivory lilac lime magenta
maroon mauve navy ochre olive orange pink purple red scarlet silver teal tan turquoise violet white yellow
"""
)

NOUNS = listed(
    """
anchor apron arrow atlas barrel basin basket beacon bell bench blanket boat bottle bowl box bracket branch
brick bridge broom brush bucket button cabin cabinet candle canyon cape cargo carpet castle cellar chain
chair chapel chest circle clock cloud coin column compass corner cradle crown crystal cupboard curtain desk
diamond ditch door drawer dress drum engine fabric feather fence field flag flame flask forest fork fountain
frame garden gate glass globe glove hammer harbor hat helmet hill hinge hook horn island jacket jar kettle
key kitchen ladder lake lamp lantern leaf ledge lemon letter library locker loom magnet map market mask
meadow medal mill mirror monument mountain nail needle nest oven paddle palace paper parcel pebble pencil
pepper piano pillow pipe planet plate pocket pond prism quarry quilt radio rail ribbon ring river rocket
roof rope saddle sail scarf shelf shell shield ship shovel signal silk spoon spring stable stamp statue
stove sugar table tent thread ticket timber tower tractor trail tray trunk tunnel valley vase velvet village
violin wagon wall wheel whistle window wire yard
"""
)

ADJECTIVES = listed(
    """
ancient bitter bold brave brief bright broken calm careful cheap clean clever cold common cool curious damp
dark deep dry dusty eager early empty faint fair famous fast fine firm flat fresh gentle giant glad grand
great happy hard heavy hidden high hollow honest huge humble icy idle kind large late lazy light little
local lonely long loose loud lucky mild modern narrow neat new noble odd old open pale plain polite proud
quick quiet rare ready rich ripe rough round royal rusty safe salty shallow sharp short shy silent simple
slow small smooth soft solid steady steep stiff strange strong sudden sunny sweet swift tall tame tender
thick thin tidy tiny tough vast warm weak wet wide wild wise wooden young
"""
)

_ONSETS = (*listed("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z"), "")
_VOWELS = listed("a a e e i i o o u ai ea ia io oa ou")
_CODAS = (*listed("n r l s m t k d nd rt x th sk ll"), *[""] * 12)


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")


def in_split(word: str, split: Split) -> bool:
    """Tell whether `word` belongs to `split`: a fixed fifth of all words is held out for "test"."""
    return (zlib.crc32(word.lower().encode()) % 5 == 0) == (split == "test")


@lru_cache
def part(words: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Return the words of `words` that belong to `split`, in order."""
    return tuple(word for word in words if in_split(word, split))


def invented(rng: random.Random, split: Split, *, syllables: tuple[int, int] = (2, 3)) -> str:
    """Invent a capitalised name of `syllables` = (fewest, most) syllables that belongs to `split`."""
    while True:
        count = rng.randint(*syllables)
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_CODAS)
        if len(word) > 3 and in_split(word, split):
            return word.capitalize()


def number(rng: random.Random, split: Split, digits: int) -> str:
    """Draw a number of exactly `digits` digits that belongs to `split`."""
    while True:
        value = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if in_split(value, split):
            return value


def first_name(rng: random.Random, split: Split) -> str:
    """Draw a first name: a real one, or an invented one in two cases of five."""
    return invented(rng, split) if rng.random() < 0.4 else rng.choice(part(FIRST_NAMES, split))


def full_name(rng: random.Random, split: Split) -> str:
    """Draw a first name with a surname, either of which may be invented."""
    last = invented(rng, split) if rng.random() < 0.3 else rng.choice(part(SURNAMES, split))
    return f"{first_name(rng, split)} {last}"


def person(rng: random.Random, split: Split) -> str:
    """Draw a first name or a full name."""
    return full_name(rng, split) if rng.random() < 0.5 else first_name(rng, split)


def place(rng: random.Random, split: Split) -> str:
    """Draw a city, or an invented one in half of the cases."""
    return invented(rng, split) if rng.random() < 0.5 else rng.choice(part(CITIES, split))


def compound(rng: random.Random, split: Split) -> str:
    """Draw an adjective-noun pair such as "quiet-lantern" that belongs to `split` as a pair."""
    while True:
        word = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if in_split(word, split):
            return word
