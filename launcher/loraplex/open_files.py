"""How many files, and so connections, the server may have open: raised as far as the system lets this user."""

import resource

# More than any one machine serves; each open one costs the kernel memory.
WANTED = 65_536
# Below it the limit may be met: each connection takes one.
FEW = 10_000 + 512


def raise_open_files() -> str | None:
    """Raise the limit of this process and of those that it starts; a warning where few are allowed all the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft == resource.RLIM_INFINITY or soft >= FEW:
        return None
    return (
        f"at most {soft} files can be open at a time, and each connection is one: raise the hard limit (ulimit -Hn; "
        "LimitNOFILE= of systemd, --ulimit nofile=65536 of docker run)"
    )
