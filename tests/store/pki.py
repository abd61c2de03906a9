"""Certificates made on the spot, by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tundp.lab.etcd import ServerTls


@dataclass(frozen=True, slots=True)
class Pki:
    """PEM files by name, `<name>.pem` and `<name>.key`."""

    directory: Path

    def cert(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def server(self, name: str, *, client_ca: str = "") -> ServerTls:
        ca = self.cert(client_ca) if client_ca else None
        return ServerTls(certfile=self.cert(name), keyfile=self.key(name), cafile=ca)

    def access(self, *, ca: str = "ca", client: str = "") -> dict[str, str]:
        """The fields of EtcdAccess."""
        files = {"cafile": str(self.cert(ca))} if ca else {}
        if client:
            files |= {"certfile": str(self.cert(client)), "keyfile": str(self.key(client))}
        return files

    def make_ca(self, name: str) -> None:
        self._openssl(
            "req -x509 -days 2 -addext keyUsage=critical,keyCertSign"
            f" -addext basicConstraints=critical,CA:TRUE {self._new_key(name)} -out {name}.pem"
        )

    def make(self, name: str, *, ca: str = "ca", usage: str, alt_name: str = "") -> None:
        alt_names = f"-addext subjectAltName={alt_name}" if alt_name else ""
        self._openssl(
            f"req -x509 -days 2 -CA {ca}.pem -CAkey {ca}.key {self._new_key(name)} {alt_names}"
            " -addext basicConstraints=critical,CA:FALSE"
            f" -addext extendedKeyUsage={usage} -out {name}.pem"
        )

    def make_expired(self, name: str, *, ca: str = "ca") -> None:
        self._openssl(f"req -new {self._new_key(name)} -out {name}.csr")
        self._openssl(
            f"x509 -req -in {name}.csr -CA {ca}.pem -CAkey {ca}.key -days -1 -out {name}.pem"
        )

    def _new_key(self, name: str) -> str:
        curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        return f"{curve} -keyout {name}.key -subj /CN={name}"

    def _openssl(self, arguments: str) -> None:
        argv = ["openssl", *arguments.split()]
        done = subprocess.run(argv, cwd=self.directory, capture_output=True, check=False)
        assert done.returncode == 0, (argv, done.stderr.decode())
