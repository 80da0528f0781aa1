"""What a method or a strategy needs of its clients, and where it was published; ``mosaic methods`` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A publication: ``key`` in BibTeX, ``venue`` in short ("" for a preprint), ``authors`` joined by ", "."""

    key: str
    title: str
    venue: str
    year: int
    authors: str
    arxiv: str = ""
    doi: str = ""
    url: str = ""

    def citation(self) -> str:
        """Return the publication in one line."""
        places = [f"{self.venue} {self.year}" if self.venue else str(self.year)]
        places += [f"arXiv {self.arxiv}"] if self.arxiv else []
        places += [f"doi {self.doi}"] if self.doi else []
        places += [self.url] if self.url else []
        return f'{self.authors}. "{self.title}". {", ".join(places)}'

    def bibtex(self) -> str:
        """Return the publication as a BibTeX entry."""
        fields = {"title": f"{{{self.title}}}", "author": self.authors.replace(", ", " and ")}
        fields |= {"booktitle": self.venue} if self.venue else {}
        fields["year"] = str(self.year)
        fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"} if self.arxiv else {}
        fields |= {"doi": self.doi} if self.doi else {}
        fields |= {"url": self.url} if self.url else {}
        lines = [f"  {name} = {{{value}}}" for name, value in fields.items()]
        return ",\n".join([f"@{'inproceedings' if self.venue else 'misc'}{{{self.key}", *lines]) + "\n}"


@dataclass(frozen=True)
class About:
    """What a method or a strategy needs of its clients, beside the models that they train.

    Args:
        rounds: how often clients take part.
        generators: whether clients train and send generators.
        statistics: what else they send that is computed from their images; "" for nothing.
        label_counts: where a client's label counts are used: at the client, or on the server; "" for nowhere.
        state: what a client keeps between rounds; "" for nothing.
        data_free: whether real images stay at the clients and train nothing but their models.
        papers: where it was published.
    """

    rounds: str = "every round"
    generators: bool = False
    statistics: str = ""
    label_counts: str = ""
    state: str = ""
    data_free: bool = True
    papers: tuple[Paper, ...] = ()

    def rows(self) -> dict[str, str]:
        """Return what is needed, in words, by name."""
        flags = {True: "yes", False: "no"}
        return {
            "data-free": flags[self.data_free], "generators": flags[self.generators],
            "statistics": self.statistics or "no", "label counts": self.label_counts or "no",
            "state": self.state or "no", "rounds": self.rounds,
        }  # fmt: skip

    def summary(self) -> str:
        """Return what is needed in one sentence."""
        sent = [*(["generators"] if self.generators else []), *filter(None, [self.statistics])]
        sent += [] if self.data_free or self.statistics else ["real images"]
        kept = f", keep {self.state}" if self.state else ""
        counts = f", label counts {self.label_counts}" if self.label_counts else ""
        return f"Clients send {' and '.join(sent) or 'nothing more'}{kept}{counts}; {self.rounds}."
