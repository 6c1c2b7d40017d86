"""The fonts that the glyphs are drawn with: where each comes from and under which licence.

Every row is a Debian package of the section `main`. Its licence was read in the package's
`/usr/share/doc/PACKAGE/copyright` (Debian 12) and is that of the font files named here, not that of
the packaging. Only licences that make no claim on what is drawn with a font were taken: SIL OFL,
Apache, MIT, BSD, Bitstream Vera, public domain, and the GPL with the exception for documents. No
font file is part of this repository or of the data set: only pictures of their glyphs are.
"""

import dataclasses
import pathlib

from vitcls.errors import UserError

FONT_ROOT = pathlib.Path("/usr/share/fonts")  # where Debian and Ubuntu put fonts

OFL = "OFL-1.1"
GPL = "GPL with font exception"


@dataclasses.dataclass(frozen=True)
class Package:
    """One Debian package and the files that are used of it.

    Attributes:
      name: What `apt-get install` calls it.
      licence: Licence of the font files.
      files: File names, found anywhere below the font root: folders differ between releases.
      held_out: Whether its fonts draw the test split only.
      capitals_only: Whether its small letters are drawn as capitals, and therefore left out.
    """

    name: str
    licence: str
    files: tuple[str, ...]
    held_out: bool = False
    capitals_only: bool = False


# Drawn by hand, or after handwriting.
HANDWRITTEN = (
    Package("fonts-aoyagi-kouzan-t", "public domain", ("AoyagiKouzanT.ttf",)),
    Package("fonts-breip", "OFL-1.0", ("Breip.ttf",)),
    Package(
        "fonts-bwht",
        OFL,
        (
            "BecauseWeBuild-Regular.otf",
            "BecauseWeConnect-Regular.otf",
            "BecauseWeCreate-Regular.otf",
            "BecauseWeLearn-Regular.otf",
            "BecauseWeMentor-Regular.otf",
            "BecauseWeOrganize-Regular.otf",
        ),
        capitals_only=True,
    ),
    Package(
        "fonts-comic-neue",
        OFL,
        ("ComicNeue-Regular.otf", "ComicNeue-Light.otf", "ComicNeue-Italic.otf"),
    ),
    Package("fonts-dancingscript", OFL, ("DancingScript-Regular.otf",)),
    Package("fonts-dkg-handwriting", OFL, ("dkg.ttf", "dkgIt.ttf")),
    Package("fonts-ecolier-court", OFL, ("Ecolier-court.ttf",)),
    Package("fonts-havana", OFL, ("Havana-Regular.otf",)),
    Package("fonts-humor-sans", OFL, ("Humor-Sans.ttf",), capitals_only=True),
    Package("fonts-kaushanscript", OFL, ("KaushanScript-Regular.otf",)),
    Package("fonts-kiloji", "BSD-3-Clause", ("kiloji.ttf",)),
    Package("fonts-kristi", OFL, ("Kristi.ttf",), held_out=True),
    Package("fonts-leckerli-one", OFL, ("LeckerliOne-Regular.ttf",)),
    Package("fonts-lobstertwo", OFL, ("LobsterTwo-Regular.otf",)),
    Package("fonts-rufscript", GPL, ("Rufscript010.ttf",), held_out=True),
    Package("fonts-seto", OFL, ("setofont.ttf",)),
    Package("fonts-sjfonts", GPL, ("Delphine.ttf", "SteveHand.ttf")),
    Package("fonts-smc-chilanka", OFL, ("Chilanka-Regular.otf",)),
    Package("fonts-smc-karumbi", OFL, ("Karumbi-Regular.ttf",)),
    Package("fonts-stick", OFL, ("Stick-Regular.ttf",)),
    Package("fonts-tlwg-purisa-otf", GPL, ("Purisa.otf", "Purisa-Oblique.otf")),
    Package("fonts-tomsontalks", OFL, ("TomsonTalks.ttf",), held_out=True, capitals_only=True),
    Package("fonts-yusei-magic", OFL, ("YuseiMagic-Regular.ttf",), held_out=True),
)

# Typefaces for print and screens: sans, serif, monospace.
PRINTED = (
    Package("fonts-adf-gillius", GPL, ("GilliusADF-Regular.otf", "GilliusADF-Italic.otf")),
    Package("fonts-adf-mekanus", GPL, ("MekanusADFStd-Regular.otf",)),
    Package("fonts-adf-universalis", GPL, ("UniversalisADFStd-Regular.otf",)),
    Package("fonts-agave", "MIT", ("agave-r-autohinted.ttf",)),
    Package("fonts-allerta", OFL, ("allerta_medium.otf",)),
    Package("fonts-anonymous-pro", OFL, ("Anonymous Pro.ttf",), held_out=True),
    Package(
        "fonts-averia-sans-gwf",
        OFL,
        ("AveriaSansGWF-Light.ttf", "AveriaSansGWF-Italic.ttf", "AveriaSansGWF-Bold.ttf"),
    ),
    Package("fonts-b612", OFL, ("B612-Regular.otf", "B612Mono-Regular.otf")),
    Package("fonts-cabin", OFL, ("Cabin-Regular.otf", "Cabin-Italic.otf"), held_out=True),
    Package("fonts-cantarell", OFL, ("Cantarell-Light.otf", "Cantarell-Bold.otf")),
    Package("fonts-comfortaa", OFL, ("Comfortaa-Light.ttf", "Comfortaa-Bold.ttf")),
    Package("fonts-courier-prime", OFL, ("Courier Prime.otf", "Courier Prime Sans.otf")),
    Package("fonts-crosextra-carlito", OFL, ("Carlito-Regular.ttf", "Carlito-Italic.ttf")),
    Package(
        "fonts-dejavu-core",
        "Bitstream Vera",
        ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf"),
    ),
    Package(
        "fonts-dejavu-extra",
        "Bitstream Vera",
        ("DejaVuSans-ExtraLight.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif-Italic.ttf"),
    ),
    Package("fonts-dosis", OFL, ("Dosis-Light.otf", "Dosis-SemiBold.otf"), held_out=True),
    Package("fonts-ebgaramond", OFL, ("EBGaramond12-Regular.otf", "EBGaramond12-Italic.otf")),
    Package("fonts-essays1743", "OFL-1.1 or LGPL-2.1", ("Essays1743.ttf", "Essays1743-Italic.ttf")),
    Package(
        "fonts-freefont-ttf",
        GPL,
        ("FreeSans.ttf", "FreeSansOblique.ttf", "FreeSerif.ttf", "FreeMono.ttf"),
    ),
    Package(
        "fonts-georgewilliams",
        "OFL-1.1 or BSD-3-Clause",
        ("Caliban.ttf", "Cupola.ttf", "GWMonospace.ttf", "CaslonItalic.ttf"),
    ),
    Package("fonts-gfs-neohellenic", OFL, ("GFSNeohellenic.otf", "GFSNeohellenicIt.otf")),
    Package("fonts-gnutypewriter", OFL, ("GNUTypewriter.ttf",)),
    Package("fonts-inconsolata", "OFL-1.0", ("Inconsolata.otf",)),
    Package("fonts-junction", OFL, ("Junction.otf",)),
    Package("fonts-jura", OFL, ("Jura-Light.otf", "Jura-SemiBold.otf")),
    Package("fonts-karla", OFL, ("Karla-Regular.otf", "Karla-Italic.otf")),
    Package(
        "fonts-lato",
        OFL,
        ("Lato-Light.ttf", "Lato-Regular.ttf", "Lato-Italic.ttf", "Lato-Black.ttf"),
    ),
    Package(
        "fonts-liberation2",
        OFL,
        ("LiberationSans-Regular.ttf", "LiberationSerif-Italic.ttf", "LiberationMono-Regular.ttf"),
    ),
    Package(
        "fonts-linuxlibertine",
        "GPL with font exception and OFL-1.1",
        ("LinBiolinum_R.otf", "LinBiolinum_RI.otf", "LinLibertine_RI.otf"),
    ),
    Package("fonts-manrope", OFL, ("Manrope-Regular.ttf",)),
    Package("fonts-monofur", OFL, ("monof55.ttf", "monof56.ttf")),
    Package("fonts-mononoki", OFL, ("mononoki-Regular.ttf", "mononoki-Italic.ttf")),
    Package("fonts-motoya-l-maruberi", "Apache-2.0", ("MTLmr3m.ttf",)),
    Package("fonts-national-park", OFL, ("NationalPark-Regular.otf", "NationalPark-Thin.otf")),
    Package("fonts-ocr-a", "public domain", ("OCRA.ttf",)),
    Package("fonts-okolaks", OFL, ("okolaksRegular.ttf", "okolaksRegularItalic.ttf")),
    Package("fonts-oldstandard", "OFL-1.0", ("OldStandard-Regular.ttf", "OldStandard-Italic.ttf")),
    Package("fonts-open-sans", "Apache-2.0", ("OpenSans-Light.ttf", "OpenSans-Italic.ttf")),
    Package("fonts-osifont", GPL, ("osifont.ttf",)),
    Package("fonts-play", OFL, ("Play-Regular.otf",), held_out=True),
    Package("fonts-quattrocento", OFL, ("Quattrocento-Regular.otf",), held_out=True),
    Package("fonts-quicksand", OFL, ("Quicksand-Light.ttf", "Quicksand-Bold.ttf")),
    Package(
        "fonts-roboto-unhinted",
        "Apache-2.0",
        ("Roboto-Light.ttf", "Roboto-Italic.ttf", "RobotoCondensed-Regular.ttf"),
    ),
    Package(
        "fonts-routed-gothic",
        OFL,
        ("routed-gothic.ttf", "routed-gothic-italic.ttf", "routed-gothic-wide.ttf"),
    ),
    Package("fonts-sil-andika", OFL, ("Andika-Regular.ttf", "Andika-Italic.ttf")),
    Package("fonts-smiley-sans", "OFL-1.1 or CC0-1.0", ("SmileySans-Oblique.ttf",)),
    Package("fonts-sora", OFL, ("Sora-Light.otf",)),
    Package("fonts-tuffy", "public domain", ("Tuffy.ttf", "Tuffy_Italic.ttf"), held_out=True),
    Package("fonts-yanone-kaffeesatz", OFL, ("YanoneKaffeesatz-Regular.otf",)),
)

PACKAGES = HANDWRITTEN + PRINTED


def locate(
    packages: tuple[Package, ...] = PACKAGES, root: pathlib.Path = FONT_ROOT
) -> dict[Package, list[pathlib.Path]]:
    """The font files of every package, in the order of the table.

    Raises:
      UserError: A file is missing; names the packages to install.
    """
    found = {path.name: path for path in sorted(root.rglob("*.[ot]tf"))}
    missing = [p.name for p in packages if any(file not in found for file in p.files)]
    if missing:
        raise UserError(
            f"Fonts are missing below {root}: {', '.join(missing)}. Install them with `make fonts` "
            "(Debian or Ubuntu, as root), or with your system's own packages of the same fonts."
        )
    return {p: [found[file] for file in p.files] for p in packages}


if __name__ == "__main__":  # what `make fonts` installs
    print(*(package.name for package in PACKAGES))
