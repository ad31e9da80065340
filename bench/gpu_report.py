"""What a run of bench/gpu.py has found: the JSON file, which a later process can go on with."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(slots=True)
class Report:
    """Rows and mishaps by part. `running`: the part under way, or the one that a process was lost to."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    running: str | None = None
    seconds: float = 0.0
    host: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Report":
        """What the file holds, or nothing where there is none yet."""
        if not path.exists():
            return cls()
        found = json.loads(path.read_text())
        del found["wrong"]
        return cls(**found)

    def write(self, path: Path) -> None:
        """Write all of it; a reader finds the old file or the new one."""
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps({"wrong": self.wrong()} | asdict(self), indent=1))
        beside.replace(path)

    def wrong(self) -> list[str]:
        """The checks that found a difference."""
        return [name for name, rows in self.tables.items() if any(row.get("ok") is False for row in rows)]

    def has(self, part: str) -> bool:
        """Whether a part has been run, to its end or not."""
        return part in self.tables or part in self.failed
