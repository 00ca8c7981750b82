"""How is a bundle signed without a key of one's own? By Sigstore, for an OIDC identity.

Sigstore's authority (Fulcio) certifies a key that lives for this signature alone, and its log
(Rekor) keeps the signature. The `sigstore` library does both (extra `sigstore`), as in
`model_signing sign sigstore`; what is signed is given here, since bundles may be in a bucket.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorserve.bundle.manifest import SIGNATURE
from tensorserve.bundle.model_signature import parse_signature
from tensorserve.bundle.signature_trust import SignedBy
from tensorserve.bundle.sigstore_trust import INSTALL, TrustedIdentity, said
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError, SourceUnavailableError
from tensorserve.packing.model_signer import BundleSigner

AMBIENT = "ambient"
# Fulcio's: who vouched for the identity (https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md).
_ISSUER = "1.3.6.1.4.1.57264.1.1"


class KeylessSigner(BundleSigner):
    """Signs for the identity of a token."""

    def __init__(self, token: str, config: Any) -> None:
        """`token`: a file, or AMBIENT; `config`: a sigstore.models.ClientTrustConfig.

        The token is looked at now and read again when it is used: packing may outlast it.
        """
        self._given = token
        self._config = config
        self._by: SignedBy | None = None
        self._trust: TrustedIdentity | None = None
        self._token()

    @classmethod
    def read(cls, token: str, config: Path | None) -> KeylessSigner:
        """`config` is a file; None: the public instance. Raises ConfigurationError for what does
        not fit, SourceUnavailableError where the public instance does not say what it is."""
        try:
            from sigstore.models import ClientTrustConfig
        except ImportError as error:
            raise ConfigurationError(
                "--sign-identity-token needs the library `sigstore`.", hint=INSTALL
            ) from error
        if config is None:
            try:
                return cls(token, ClientTrustConfig.production())
            except ConfigurationError:
                raise
            except Exception as error:  # noqa: BLE001 - TUF's, requests', the library's own
                raise SourceUnavailableError(
                    f"The public Sigstore's trust root could not be fetched ({said(error)}).",
                    hint="It is at https://tuf-repo-cdn.sigstore.dev. An instance of your own: "
                    "--sign-trust-config.",
                ) from None
        data = read_secret(config, f"The trust configuration {config}").reveal()
        try:
            found = ClientTrustConfig.from_json(data.decode())
            _ = (found.trusted_root, found.signing_config)  # each is checked when it is asked for
        except Exception as error:  # noqa: BLE001 - as above
            raise ConfigurationError(
                f"{config} is not a client trust configuration of Sigstore ({said(error)}).",
                hint="It holds trustedRoot and signingConfig.",
            ) from None
        return cls(token, found)

    @property
    def by(self) -> SignedBy:
        """See BundleSigner."""
        assert self._by is not None
        return self._by

    @property
    def trust(self) -> TrustedIdentity:
        """See BundleSigner."""
        if self._trust is None:
            raise ConfigurationError(
                "The bundle is signed, and it is not said whose signature is expected there.",
                hint="Set TENSORSERVE_SIGNATURE_IDENTITY, TENSORSERVE_SIGNATURE_ISSUER and "
                "TENSORSERVE_SIGNATURE_TRUST_ROOT_FILE, or the key that signed.",
            )
        return self._trust

    def _signed(self, payload: bytes) -> bytes:
        from sigstore.dsse import Statement
        from sigstore.sign import SigningContext

        token = self._token()
        try:
            with SigningContext.from_trust_config(self._config).signer(token) as signer:
                bundle = signer.sign_dsse(Statement(payload))
        # Two services' clients, which raise their own and requests' errors.
        except Exception as error:  # noqa: BLE001
            raise SourceUnavailableError(
                f"Sigstore did not sign ({type(error).__name__}: {said(error)}).",
                hint="Does its authority accept the token (its issuer and audience), and can both "
                "services be reached from here?",
            ) from None
        made: bytes = bundle.to_json().encode()
        identity, issuer = _signer_of(bundle.signing_certificate)
        self._trust = TrustedIdentity(
            identity, issuer, self._config.trusted_root, "--sign-identity-token"
        )
        self._by = parse_signature(made, SIGNATURE, self._trust).by
        return made

    def _token(self) -> Any:
        """A sigstore.oidc.IdentityToken. Raises ConfigurationError, without the token."""
        from sigstore.oidc import IdentityToken, detect_credential

        try:
            raw = (
                detect_credential()
                if self._given == AMBIENT
                else read_secret(self._given, f"The token {self._given}").reveal().decode().strip()
            )
            if not raw:
                raise ConfigurationError(
                    "--sign-identity-token ambient: nothing here gives a token.",
                    hint="GitHub Actions (id-token: write), GitLab, Buildkite and Google Cloud do.",
                )
            return IdentityToken(raw)
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001 - the library's, and the decoder's
            raise ConfigurationError(
                f"--sign-identity-token {self._given} gives no OIDC token that is valid now "
                f"({said(error)}).",
                hint="It is a JWT for the audience `sigstore`. Take a new one.",
            ) from None


def _signer_of(certificate: Any) -> tuple[str, str]:
    """(identity, issuer) in Fulcio's `certificate`."""
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = (x509.RFC822Name, x509.UniformResourceIdentifier)
    found = [value for kind in known for value in names.get_values_for_type(kind)]
    issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(_ISSUER)).value
    if not found:
        raise ConfigurationError(
            "Sigstore certified a signer who is neither an e-mail address nor a URI.",
            hint="Take a token of another issuer.",
        )
    return found[0], issuer.value.decode()
