"""Which of the embedded objects can play which role in a furnished room: a bed, something to stand on a desk, a fridge..."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from geossl.data.objects import PLACEMENTS, load_objects

# Frames of thin rails and wires whose 1,024 points leave more holes than surface, and models that are not what their class says.
UNSUITED = frozenset({428, 503, 86, 795, 635, 769, 768, 294, 357})


@dataclass(frozen=True)
class Role:
    """A filter over the attribution table; sizes are ranges in metres.

    Args:
        classes: Classes, ``-`` for objects without one; empty takes all.
        names: Regular expression the whole name must match.
        placement: Where the object goes.
        width: Size along x, across the front.
        depth: Size along y, front to back.
        height: Size along z.
        categories: Rooms of the source catalogue; empty takes all.
    """

    classes: tuple[str, ...] = ()
    names: str = ".*"
    placement: str = "floor"
    width: tuple[float, float] = (0.0, 9.0)
    depth: tuple[float, float] = (0.0, 9.0)
    height: tuple[float, float] = (0.0, 9.0)
    categories: tuple[str, ...] = ()


def _small(classes: tuple[str, ...], *names: str, **more: tuple[float, float]) -> Role:
    """Return the role of things that stand on others."""
    return Role(classes, "|".join(names), "on_top", **more)  # type: ignore[arg-type]


ROLES = {
    "bed": Role(("bed",), width=(1.25, 2.3), height=(0.5, 1.2)),
    "single bed": Role(("bed",), "Child bed|Bunk bed|Day bed|Captain's bed", width=(0.85, 2.2)),
    "bedside table": Role(("storage",), "Bedside table|Shelves|Filing cabinet", width=(0.3, 0.65), height=(0.35, 0.85)),
    "wardrobe": Role(("storage",), "Wardrobe|Cupboard|Shelves", width=(0.9, 2.2), height=(1.4, 2.4), categories=("Bedroom",)),
    "dresser": Role(("storage",), "Dresser.*|Chest|TV stand|Cupboard|Bookcase", width=(0.9, 1.7), height=(0.5, 1.55)),
    "dressing table": Role(("table", "-"), "Dressing table|Changing table|Doll house"),
    "sofa": Role(("sofa",), "(?!Opened|Corner).*", width=(1.4, 2.35), depth=(0.0, 1.1)),
    "corner sofa": Role(("sofa",), "Corner sofa|Couch|Sofa", width=(2.2, 3.5)),
    "armchair": Role(("chair",), "(Modern |Winchester )?[Aa]rmchair|Chair", width=(0.6, 1.15), height=(0.68, 1.02)),
    "coffee table": Role(("table",), "Coffee table|Table", width=(0.8, 1.5), height=(0.25, 0.55)),
    "side table": Role(("table", "storage"), "Round table|Table|Children table|Bedside table", width=(0.4, 0.75), height=(0.4, 0.76)),
    "tv stand": Role(("storage",), "TV stand|Dresser with drawers|Chest", width=(1.2, 1.7), height=(0.4, 0.85)),
    "tv": _small(("electronics",), "TV|TV 16:9", width=(0.5, 1.2)),
    "wall tv": Role(("electronics",), "Wall flat TV", "wall"),
    "shelf": Role(("storage",), "Bookcase|Full bookcase|Vertical shelves|Shelves", width=(0.4, 2.6), height=(1.1, 2.3)),
    "narrow shelf": Role(("storage",), "Bookcase|Full bookcase|Vertical shelves|Shelves", width=(0.4, 1.05), height=(0.7, 2.3)),
    "piano": Role(("-",), "Upright piano|Fireplace|Aquarium"),
    "fireplace": Role(("appliance",), "Fireplace", height=(0.8, 1.3)),
    "desk": Role(
        ("table",), "Desk|Desk table|Wooden desk|Table on trestles|Table", width=(0.95, 1.65), depth=(0.5, 0.85), height=(0.65, 1.1)
    ),
    "office chair": Role(("chair",), "Chair|Armchair", categories=("Office",), width=(0.5, 0.7)),
    "chair": Role(("chair",), "Chair.*|Oak chair|Plastic chair|Osaka chair|Folding chair", width=(0.38, 0.6), height=(0.7, 1.2)),
    "dining table": Role(("table",), "(?!Coffee|Desk|Technical).*", width=(1.0, 1.95), depth=(0.7, 1.3), height=(0.7, 0.8)),
    "stool": Role(("-", "chair"), "Stool|Bar stool|Bar chair", height=(0.4, 1.1)),
    "filing cabinet": Role(("storage",), "Filing cabinet|Safe|Drawers cabinet", width=(0.35, 0.6), height=(0.45, 0.95)),
    "floor plant": Role(("plant",), "(?!Christmas).*", width=(0.0, 1.1)),
    "tree": Role(("plant",), "Christmas tree"),
    "floor lamp": Role(("lamp",), "Lamp"),
    "table lamp": _small(("lamp",), "Desk lamp|Lamp|Little lamp|Pedestal vase lamp|Japanese lantern", height=(0.3, 0.8)),
    "ceiling lamp": Role(("lamp",), "Hanging light|Lamp|Pendant lamp|Ceiling lamp", "ceiling", height=(0.0, 0.9)),
    "ceiling fan": Role(("-",), "Ceiling fan", "ceiling"),
    "wall lamp": Role(("lamp",), "Wall light|Wall lamp artwork", "wall"),
    "clock": Role(("-",), "Cuckoo clock|Dart game", "wall"),
    "radiator": Role(("appliance",), "Radiator", "wall", height=(0.5, 0.9)),
    "air conditioner": Role(("appliance",), "Air conditioning.*", "wall"),
    "laptop": _small(
        ("electronics",),
        "Laptop|Apple i(Book|Mac.*)",
    ),
    "desk things": _small(
        ("electronics", "-", "vessel", "tool"),
        "Phone|Inkjet.*|Radio|Penbox|Letter tray|Calendar|Book|Coffee mug|Globe|Newspaper|Speaker|Frame .*|Table fan|Clock",
    ),
    "lounge things": _small(
        ("plant", "vessel", "-", "electronics"),
        "Vase|Tulips|Flowers|Orchids|White lily|Bowl with fruits|Book|Chessboard|Teapot|Wine bottle"
        "|Candle|Bonsai tree|Newspaper|Radio|Old jar"
        "|Plant|Deer|Coffee mug|TV remote control|Tray|Cactus|Little plant|Gift|Mini stereo|Aquarium",
    ),
    "bedroom things": _small(
        ("-", "electronics", "plant", "vehicle", "vessel"),
        "Clock|Book|Teddy bear|Handbag|Hat|Cap|Toy train|Car model|Doll|Frame .*|Folded clothes|Radio|Vase|Flowers|Orchids"
        "|Rubik's cube|Gift",
    ),
    "kitchen things": _small(
        ("appliance", "vessel", "-"),
        "Blender|Boiler|Coffee (maker|brewer|press)|Mixer|Toaster|Microwave|Large pan|Bowl.*|Teapot|Bread box"
        "|Spice tower|Knife stand|Kitchen scale"
        "|Utensils pot|Paper towel holder|Wine bottle|Old jar|Milk|Small oven|Coffee machine|Cooker",
    ),
    "dining things": _small(
        ("vessel", "-", "plant"),
        "Bowl with (fruits|salad)|Plate, glass(es)? and cutlery|Vase|Tulips|Flowers"
        "|Wine bottle|Roasted chicken|Birthday cake|Sushi tray|Teapot|Milk"
        "|Beer glass|Apples|Bread",
    ),
    "lower cabinet": Role(("storage",), "Small lower cabinet|Lower cabinet|Drawers cabinet", depth=(0.6, 0.65), height=(0.85, 0.9)),
    "upper cabinet": Role(("storage",), "Small upper cabinet|Upper cabinet|Glass door cabinet|Upper shelves cabinet", "wall"),
    "sink": Role(("bath_fixture", "storage"), "Sink|Sink cabinet", categories=("Kitchen",)),
    "stove": Role(("appliance",), "Large stove", height=(0.8, 0.9)),
    "kitchen machine": Role(("appliance",), "Clothes washing machine|Dryer machine|Washing machine"),
    "hood": Role(("appliance",), "Hood|Range hood", "wall"),
    "fridge": Role(("appliance",), "Fridge|Refrigerator|Large fridge"),
    "bath": Role(("bath_fixture",), "Bath|Island bath|Corner bathtub"),
    "shower": Role(("bath_fixture",), "Shower stall"),
    "toilet": Role(("bath_fixture",), "Toilets unit"),
    "bidet": Role(("bath_fixture",), "Bidet"),
    "washbasin": Role(("bath_fixture",), "Washbasin|Vanity|Double vanity", width=(0.5, 1.9)),
    "towel rack": Role(("-",), "Towel rack|Towel", "wall"),
    "bathroom floor": Role(("-", "vessel", "tool"), "Clothes basket|Bullet trash can|Stool|Shopping basket|Dustbin", height=(0.3, 0.8)),
    "bathroom things": _small(
        ("-", "vessel", "plant"),
        "Towel|Soap|Flacon|Bottle|Cosmetics pot|Medicine bottle|Cactus|Orchids",
    ),
    "toys": Role(("-", "vehicle"), "Rocking horse|Tricycle|Soccer ball|Basketball|Open cardboard box|Xylophone|Doll house|Skateboard"),
    "floor things": Role(
        ("-", "vessel"),
        "Backpack|Suitcase|Trunck|Cardboard box|Briefcase|Vase|Electric guitar|Puff|Stool"
        "|Cat|Dog|Bulldog|Crate|Piano bench|Recycling bin|Box",
        width=(0.1, 1.05),
        height=(0.2, 1.2),
    ),
    "bin": Role(("vessel",), "Dustbin|Bullet trash can|Recycling bin"),
    "big game": Role(
        ("-",), "Pool table|Football table|Table tennis|Flipper|Upright piano|Indoor bike|Treadmill|Punching ball|Clothes horse"
    ),
    "workbench": Role(("table",), "Workbench|Technical table"),
    "garage things": Role(
        ("-", "storage", "vessel", "vehicle"), "(Step|Small step) ladder|Extinguisher|Crate|Barrel|Box|Wood logs|Cardboard box|Stroller"
    ),
    "tools": _small(
        ("tool", "-", "vessel"),
        "Drill|Saw|Hammer|Grinder|Screwdriver|Radio|Spray bottle|Helmet",
    ),
}


@functools.cache
def candidates(role: str) -> tuple[int, ...]:
    """Return the rows of the objects that can play ``role``."""
    wanted, library = ROLES[role], load_objects()
    pattern = re.compile(wanted.names)
    found = []
    for row, entry in enumerate(library.table):
        size = object_size(row)
        ranges = (wanted.width, wanted.depth, wanted.height)
        if (
            row not in UNSUITED
            and PLACEMENTS[library.placement[row]] == wanted.placement
            and (not wanted.classes or entry["class"] in wanted.classes)
            and (not wanted.categories or entry["category"] in wanted.categories)
            and pattern.fullmatch(entry["name"])
            and all(low <= value <= high for value, (low, high) in zip(size, ranges, strict=True))
        ):
            found.append(row)
    return tuple(found)


@functools.cache
def object_size(row: int) -> tuple[float, float, float]:
    """Return width, depth and height in metres, as the attribution table gives them."""
    entry = load_objects().table[row]
    return float(entry["width_m"]), float(entry["depth_m"]), float(entry["height_m"])


@functools.cache
def object_class(row: int) -> int:
    """Return the class of an object in :data:`room_classes`."""
    label = int(load_objects().label[row])
    return label if label >= 0 else len(load_objects().classes)


@functools.cache
def room_classes() -> tuple[str, ...]:
    """The classes of things in rooms: the 15 of the embedded objects, then ``other`` for those without a label."""
    return (*(str(name) for name in load_objects().classes), "other")


@functools.cache
def surface_height(row: int) -> float:
    """Return the height of the largest level surface of an object: the top of a table, the worktop under a shelf."""
    library = load_objects()
    z = library.xyz[row, :, 2].astype(np.float32)
    z = (z - z.min()) * np.float32(library.scale_m[row])
    level = z[(np.abs(library.normal[row, :, 2].astype(np.int32)) > 105) & (z > 0.5 * float(np.median(z)))]
    if not len(level):
        return float(z.max())
    counts, edges = np.histogram(level, bins=np.arange(0.0, float(z.max()) + 0.06, 0.03))
    best = np.flatnonzero(counts >= 0.6 * counts.max())[-1]
    return float(level[(level >= edges[best]) & (level <= edges[best + 1])].max())
