# For the scripts that take programs or sources out of Debian's packages: apt with a source of its
# own, for this one download. Nothing of the system's configuration or state is changed.
#
# To be read (`.`) by a script that has set `work`, a temporary directory, and `fail`, which says what
# is wrong and ends. Sets `release`, the system's own release.

for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "there is no $tool here: this takes packages out of Debian"
done

# attempt COMMAND…: up to three times, each within five minutes; says at the end what went wrong.
attempt() {
    for pause in 2 10 0; do
        timeout 300 "$@" >"$work/log" 2>&1 && return 0
        sleep "$pause"
    done
    cat "$work/log" >&2
    return 1
}

# The mirror of the system's release, as apt itself reads its sources; and its keys.
. /etc/os-release
release=${VERSION_CODENAME:?no VERSION_CODENAME in /etc/os-release}
mirror=$(apt-get update --print-uris |
    sed -n "s|^'\(.*\)/dists/$release/InRelease' .*|\1|p" | head -n 1)
[ -n "$mirror" ] || fail "apt has no source for $release"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_get SUITE ARGUMENT…: apt with the one source SUITE, and a state of its own that is not kept.
apt_get() {
    state=$work/$1
    shift
    attempt apt-get -q -o Acquire::Retries=3 \
        -o Acquire::http::Timeout=60 -o Acquire::https::Timeout=60 \
        -o Acquire::Languages=none -o APT::Sandbox::User="$(id -un)" \
        -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" "$@"
}

# update KIND SUITE: reads which packages the suite has; KIND is deb or deb-src.
update() {
    mkdir -p "$work/$2/lists/partial" "$work/$2/cache/archives/partial"
    echo "$1 [signed-by=$keyring] $mirror $2 main" >"$work/$2/sources.list"
    apt_get "$2" update --error-on=any && return 0
    # An old suite's signature may have run out, or this system may not have its key.
    echo "$0: the signature of Debian $2 is not accepted: taken without it" >&2
    echo "$1 [trusted=yes] $mirror $2 main" >"$work/$2/sources.list"
    apt_get "$2" update --error-on=any ||
        fail "the list of Debian $2's packages cannot be read (above)"
}
