"""Word lists and plain facts: what the packaged model is taught and the sample rows ask about.

Imports nothing. Two writers use it: `tests.tiny_model.english` (text to train the packaged model
on) and `tests.sample_rows` (instruction rows to fine-tune it on).
"""

from __future__ import annotations


def _pairs(text: str) -> list[tuple[str, str]]:
    """``"hot cold, big small"`` to ``[("hot", "cold"), ("big", "small")]``; ``_`` stands for a space."""
    pairs = []
    for item in text.split(","):
        left, right = item.split()
        pairs.append((left.replace("_", " "), right.replace("_", " ")))
    return pairs


def _words(text: str) -> list[str]:
    return [word.replace("_", " ") for word in text.split()]


OPPOSITES = _pairs(
    "hot cold, big small, tall short, fast slow, happy sad, day night, up down, in out, open closed, old young, "
    "hard soft, wet dry, full empty, rich poor, strong weak, loud quiet, early late, high low, "
    "near far, left right, first last, good bad, clean dirty, thick thin, wide narrow, deep shallow, light heavy, "
    "sweet bitter, true false, black white, win lose, buy sell, push pull, start stop, begin end, give take, "
    "come go, love hate, laugh cry, sink float, rise fall, arrive leave, remember forget, "
    "before after, above below, inside outside, always never, more less, many few, all none, yes no, north south, "
    "east west, summer winter, morning evening, sunrise sunset, friend enemy, war peace, question answer, "
    "brave afraid, calm angry, cheap expensive, easy difficult, safe dangerous, smooth rough, straight crooked, "
    "sharp blunt, fresh stale, awake asleep, alive dead, present absent, polite rude, kind cruel, wise foolish, "
    "simple complex, same different, public private, modern ancient, front back, top bottom, entrance exit, "
    "male female, king queen, boy girl, man woman, father mother, brother sister, son daughter, uncle aunt, "
    "husband wife, teacher student, import export, increase decrease, accept refuse, "
    "build destroy, attack defend, add subtract, multiply divide, lend borrow, succeed fail, include exclude, "
    "expand contract, freeze melt, throw catch, appear vanish, victory defeat, success failure, maximum minimum, "
    "hope despair, noise silence, truth lie, profit loss, future past, heaven hell, giant dwarf, hero villain, "
    "guilty innocent, visible hidden, lucky unlucky, tight loose, busy idle, odd even, positive negative"
)

PLURALS = _pairs(
    "cat cats, dog dogs, house houses, tree trees, car cars, book books, table tables, chair chairs, "
    "apple apples, bird birds, river rivers, door doors, window windows, garden gardens, school schools, "
    "teacher teachers, doctor doctors, farmer farmers, letter letters, number numbers, flower flowers, "
    "hat hats, shoe shoes, shirt shirts, cup cups, plate plates, spoon spoons, bottle bottles, train trains, "
    "boat boats, road roads, bridge bridges, mountain mountains, island islands, star stars, cloud clouds, "
    "king kings, queen queens, friend friends, brother brothers, sister sisters, box boxes, fox foxes, "
    "bus buses, dish dishes, brush brushes, glass glasses, class classes, dress dresses, watch watches, "
    "match matches, branch branches, peach peaches, bench benches, church churches, witch witches, "
    "city cities, baby babies, story stories, party parties, lady ladies, country countries, family families, "
    "berry berries, cherry cherries, puppy puppies, pony ponies, fly flies, body bodies, army armies, "
    "leaf leaves, wolf wolves, knife knives, wife wives, life lives, half halves, shelf shelves, loaf loaves, "
    "thief thieves, man men, woman women, child children, mouse mice, goose geese, foot feet, tooth teeth, "
    "ox oxen, person people, sheep sheep, deer deer, fish fish, potato potatoes, tomato tomatoes, hero heroes, "
    "echo echoes, toy toys, key keys, boy boys, day days, monkey monkeys, donkey donkeys, valley valleys, "
    "lion lions, tiger tigers, horse horses, cow cows, pig pigs, goat goats, rabbit rabbits, snake snakes, "
    "frog frogs, bear bears, duck ducks, hen hens, lamp lamps, clock clocks, pencil pencils, ball balls, "
    "kite kites, drum drums, coin coins, ring rings, nail nails, rope ropes, wall walls, floor floors, "
    "lake lakes, hill hills, field fields, farm farms, shop shops, street streets, bag bags, ticket tickets"
)

COLOURS_OF = _pairs(
    "grass green, snow white, coal black, blood red, milk white, chocolate brown, a_lemon yellow, the_sky blue, "
    "the_sea blue, the_sun yellow, a_banana yellow, a_carrot orange, a_tomato red, a_strawberry red, "
    "a_cherry red, an_orange orange, a_pumpkin orange, a_frog green, a_leaf green, a_cucumber green, "
    "a_pea green, spinach green, a_plum purple, an_aubergine purple, a_grape purple, lavender purple, "
    "a_flamingo pink, a_pig pink, a_crow black, a_raven black, night black, a_swan white, cotton white, "
    "salt white, sugar white, rice white, coffee brown, mud brown, a_bear brown, wood brown, an_elephant grey, "
    "ash grey, a_mouse grey, a_rain_cloud grey, a_rose red, a_ruby red, an_emerald green, a_sapphire blue, "
    "gold yellow, honey yellow, a_fire_engine red, a_sunflower yellow, a_canary yellow, butter yellow, "
    "a_blueberry blue, charcoal black, tar black, chalk white, a_polar_bear white, a_kiwi green, a_lime green, "
    "a_dolphin grey, a_potato brown, a_walnut brown"
)

# animal, what it is, how many legs, what it says, its young, where it lives
ANIMALS = [
    tuple(part.strip().replace("_", " ") for part in line.split())
    for line in """
    dog mammal four barks puppy in_a_house
    cat mammal four meows kitten in_a_house
    cow mammal four moos calf on_a_farm
    horse mammal four neighs foal in_a_stable
    sheep mammal four bleats lamb on_a_farm
    pig mammal four grunts piglet on_a_farm
    goat mammal four bleats kid on_a_farm
    lion mammal four roars cub in_the_grassland
    tiger mammal four roars cub in_the_jungle
    bear mammal four growls cub in_the_forest
    wolf mammal four howls pup in_the_forest
    fox mammal four yelps cub in_the_forest
    rabbit mammal four squeaks kit in_a_burrow
    mouse mammal four squeaks pup in_a_hole
    elephant mammal four trumpets calf in_the_grassland
    monkey mammal four chatters baby in_the_jungle
    donkey mammal four brays foal on_a_farm
    deer mammal four bellows fawn in_the_forest
    whale mammal no sings calf in_the_sea
    dolphin mammal no clicks calf in_the_sea
    bat mammal two squeaks pup in_a_cave
    duck bird two quacks duckling on_a_pond
    hen bird two clucks chick on_a_farm
    goose bird two honks gosling on_a_pond
    owl bird two hoots owlet in_the_forest
    crow bird two caws chick in_a_nest
    pigeon bird two coos chick in_the_city
    sparrow bird two chirps chick in_a_nest
    robin bird two sings chick in_the_garden
    parrot bird two talks chick in_the_jungle
    eagle bird two screams eaglet in_the_mountains
    swan bird two hisses cygnet on_a_lake
    turkey bird two gobbles chick on_a_farm
    frog amphibian four croaks tadpole in_a_pond
    snake reptile no hisses hatchling in_the_grass
    lizard reptile four hisses hatchling in_the_desert
    crocodile reptile four growls hatchling in_the_river
    bee insect six buzzes larva in_a_hive
    fly insect six buzzes maggot in_the_air
    ant insect six rustles larva in_an_anthill
    cricket insect six chirps nymph in_the_grass
    """.strip().splitlines()
]

CAPITALS = _pairs(
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Scotland Edinburgh, "
    "Wales Cardiff, Ireland Dublin, Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, "
    "Iceland Reykjavik, Poland Warsaw, Austria Vienna, Switzerland Bern, Belgium Brussels, Greece Athens, "
    "Hungary Budapest, Romania Bucharest, Bulgaria Sofia, Croatia Zagreb, Serbia Belgrade, Ukraine Kyiv, "
    "Russia Moscow, Turkey Ankara, Egypt Cairo, Morocco Rabat, Tunisia Tunis, Algeria Algiers, Kenya Nairobi, "
    "Ethiopia Addis_Ababa, Ghana Accra, Nigeria Abuja, Senegal Dakar, Uganda Kampala, Zambia Lusaka, "
    "Japan Tokyo, China Beijing, India New_Delhi, Nepal Kathmandu, Thailand Bangkok, Vietnam Hanoi, "
    "Indonesia Jakarta, Malaysia Kuala_Lumpur, South_Korea Seoul, Mongolia Ulaanbaatar, Iran Tehran, Iraq Baghdad, "
    "Jordan Amman, Lebanon Beirut, Qatar Doha, Oman Muscat, Canada Ottawa, the_United_States Washington, "
    "Mexico Mexico_City, Cuba Havana, Jamaica Kingston, Brazil Brasilia, Argentina Buenos_Aires, Chile Santiago, "
    "Peru Lima, Colombia Bogota, Ecuador Quito, Bolivia Sucre, Uruguay Montevideo, Venezuela Caracas, "
    "Australia Canberra, New_Zealand Wellington, Fiji Suva"
)

PAST = _pairs(
    "go went, come came, see saw, eat ate, drink drank, run ran, sing sang, swim swam, give gave, take took, "
    "make made, buy bought, bring brought, think thought, teach taught, catch caught, write wrote, read read, "
    "speak spoke, break broke, drive drove, ride rode, rise rose, fall fell, feel felt, keep kept, sleep slept, "
    "leave left, lose lost, find found, hold held, stand stood, sit sat, tell told, sell sold, say said, pay paid, "
    "know knew, grow grew, throw threw, fly flew, draw drew, begin began, win won, meet met, send sent, build built, "
    "hear heard, wear wore, forget forgot, choose chose, hide hid, bite bit, shake shook, wake woke, dig dug, "
    "walk walked, talk talked, jump jumped, play played, work worked, look looked, help helped, call called, "
    "open opened, close closed, laugh laughed, cry cried, carry carried, try tried, stop stopped, plan planned, "
    "dance danced, smile smiled, live lived, love loved, like liked, want wanted, need needed, paint painted, "
    "cook cooked, clean cleaned, wash washed, watch watched, climb climbed, count counted, visit visited"
)

MEMBERS = {
    "fruit": _words(
        "apple banana orange pear grape cherry lemon peach plum mango strawberry melon kiwi fig lime"
    ),
    "vegetable": _words(
        "carrot potato onion cabbage pea bean cucumber spinach lettuce leek turnip radish pumpkin"
    ),
    "animal": _words(
        "dog cat horse cow lion tiger rabbit elephant monkey wolf sheep goat bear fox mouse zebra"
    ),
    "bird": _words("eagle sparrow owl crow robin parrot pigeon swan duck goose hen seagull penguin"),
    "colour": _words("red blue green yellow black white pink purple orange brown grey"),
    "tool": _words("hammer saw drill spanner screwdriver axe shovel rake spade chisel"),
    "vehicle": _words("car bus train truck bicycle boat ship plane tram van lorry motorcycle"),
    "instrument": _words("piano violin guitar drum flute trumpet harp cello trombone clarinet"),
    "piece of clothing": _words("shirt hat coat shoe sock dress skirt scarf glove jacket sweater"),
    "piece of furniture": _words("table chair bed desk sofa shelf wardrobe stool bench cupboard"),
    "drink": _words("water milk tea coffee juice lemonade cocoa"),
    "sport": _words("football tennis hockey rugby cricket golf swimming boxing basketball volleyball"),
    "part of the body": _words("hand foot head arm leg nose ear eye knee elbow shoulder finger toe"),
    "month": _words("January February March April May June July August September October November December"),
    "day of the week": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "season": _words("spring summer autumn winter"),
    "metal": _words("iron gold silver copper tin lead steel zinc"),
}

USES = _pairs(
    "a_knife to_cut, a_pen to_write, a_broom to_sweep, a_key to_open_a_door, a_clock to_tell_the_time, "
    "an_umbrella to_keep_dry, a_bed to_sleep, an_oven to_bake_bread, a_hammer to_hit_nails, a_saw to_cut_wood, "
    "a_spoon to_eat_soup, a_cup to_drink_tea, a_lamp to_give_light, a_comb to_tidy_hair, soap to_wash_hands, "
    "a_towel to_dry_hands, a_needle to_sew, a_camera to_take_pictures, a_telephone to_call_a_friend, "
    "a_ladder to_climb, a_map to_find_the_way, a_ruler to_measure, scissors to_cut_paper, a_kettle to_boil_water, "
    "a_boat to_cross_the_water, a_bucket to_carry_water, a_net to_catch_fish, a_spade to_dig, "
    "a_thermometer to_measure_heat, a_telescope to_see_the_stars, a_bell to_call_people, a_fridge to_keep_food_cold"
)

NAMES = _words(
    "Anna Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Mia Noah Olive Paul Rose Sam Tom Zoe Lucy Max "
    "Nina Oscar Ruth Simon Tina Victor Wendy Adam"
)
PLACES = _words(
    "garden park forest school market library kitchen farm beach river village station museum harbour field "
    "castle bridge hill lake shop"
)
THINGS = _words(
    "ball book cup hat key letter lamp coin kite box basket flower apple map bell drum ring stone cake rope "
    "pencil bag blanket candle clock picture ticket bottle shell toy"
)
ADJECTIVES = _words(
    "small big red old new blue heavy strange pretty soft golden broken round wooden empty shiny green long "
    "warm cold quiet bright"
)
FEELINGS = _words("happy sad tired hungry angry proud afraid surprised excited calm lonely curious")
DAYS = MEMBERS["day of the week"]
MONTHS = MEMBERS["month"]

_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = ["", "", *_words("twenty thirty forty fifty sixty seventy eighty ninety")]


def number_word(number: int) -> str:
    """The English word for 0 to 100: ``21`` is ``"twenty-one"``."""
    if number < 20:
        return _ONES[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def with_article(noun: str) -> str:
    """``"apple"`` to ``"an apple"``."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def capitalised(text: str) -> str:
    """`text` with its first letter upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def spellable() -> list[str]:
    """Short lower-case words to spell, in a fixed order and each once."""
    words = [word for pair in OPPOSITES + PLURALS + PAST for word in pair]
    words += [word for members in MEMBERS.values() for word in members] + THINGS + PLACES + ADJECTIVES
    return sorted({word for word in words if word.isalpha() and word.islower() and 2 < len(word) < 9})
