"""Any list of arguments and any environment: a Config or a ConfigError, nothing else."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tundp.config import OPTIONS, Config, load_config, parse_int
from tundp.errors import ConfigError

SETTINGS = settings(max_examples=200, deadline=None)
NAMES = st.sampled_from([option.name for option in OPTIONS])
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["1", "0", "017", "0x1f", "true", "192.0.2.1", "file:/x", "off", "auto", ","]),
)
FLAGS = st.builds(
    lambda dashes, name, equals, text: f"{dashes}{name}{equals}{text}",
    st.sampled_from(["-", "--", "", "---"]),
    NAMES | st.text(max_size=6),
    st.sampled_from(["", "=", "=="]),
    st.just("") | TEXTS,
)
GOOD = st.builds("--{}={}".format, NAMES, TEXTS)


@SETTINGS
@given(
    st.lists(st.one_of(FLAGS, GOOD, TEXTS), max_size=6),
    st.dictionaries(st.sampled_from([option.variable for option in OPTIONS]), TEXTS, max_size=3),
)
@example([f"--v={'9' * 5000}"], {})
@example(["--public-ip=\x00", "--tun-name=\x00"], {})
def test_load_config_raises_nothing_but_config_errors(arguments, environment):
    try:
        config = load_config(arguments, environment)
    except ConfigError as error:
        assert str(error)
        return
    assert isinstance(config, Config)
    assert 1 <= config.subnet_lease_renew_margin <= 1439
    assert config.lease_ttl >= 1
    assert config.etcd_endpoints
    assert config.describe()


@SETTINGS
@given(st.text(st.characters(codec="ascii", exclude_characters=","), min_size=12, max_size=20))
def test_a_long_password_never_shows(secret):
    secret = f"s3cr3t{secret}"
    arguments = ["--etcd-username=u", "--etcd-password", secret]
    assert secret not in load_config(arguments, {}).describe()
    try:
        load_config([*arguments, "--v=x"], {})
    except ConfigError as error:
        assert secret not in str(error)
    else:
        raise AssertionError("--v=x was taken")


@SETTINGS
@given(st.integers(-(2**63), 2**63 - 1))
def test_every_form_of_an_int_is_read(number):
    sign, digits = ("-", -number) if number < 0 else ("", number)
    for text in (f"{number}", f"{number:#x}", f"{number:#o}", f"{number:#b}", f"{sign}0{digits:o}"):
        assert parse_int(text) == number
