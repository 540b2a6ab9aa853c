//! Files of certificates and tokens, good and bad.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use http::HeaderValue;
use tenure_test_services::tls::{Authority, Identity};

use super::tokens::Denied;
use super::*;
use crate::config::{ClientAuth, HttpAuth, HttpTls, Right, TokenConfig, TokenSource};

const TOKEN: &str = "0123456789abcdef";
const OTHER: &str = "fedcba9876543210-and-more";

fn http_config(tls: Option<HttpTls>, auth: Option<HttpAuth>) -> HttpConfig {
    HttpConfig {
        tls,
        auth,
        ..crate::config::Config::default().http
    }
}

fn tls_config(identity: &Identity) -> HttpTls {
    HttpTls {
        cert: identity.cert.clone(),
        key: identity.key.clone(),
        ca: Some(identity.ca.clone()),
        client_auth: ClientAuth::Required,
    }
}

fn loaded(tls: HttpTls) -> Result<Tls, String> {
    let keys = Keys::load(&http_config(Some(tls), None)).map_err(|e| e.to_string())?;
    Ok(keys.tls.unwrap())
}

fn refused(tls: HttpTls) -> String {
    match loaded(tls) {
        Ok(_) => panic!("it was taken"),
        Err(e) => e,
    }
}

/// A name that is an address, as the nodes of tests have it.
const LOCAL: &str = "127.0.0.1";

fn local() -> [std::net::IpAddr; 1] {
    [LOCAL.parse().unwrap()]
}

#[test]
fn a_good_certificate_has_no_flaws() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let tls = loaded(tls_config(&authority.issue("node", &local()))).unwrap();
    assert_eq!(tls.flaws(Some(LOCAL)), [""; 0]);
    assert_eq!(tls.flaws(Some("node")), [""; 0]);
    assert!(tls.mutual());
    assert!(tls.valid_until().unwrap() > SystemTime::now());
}

#[test]
fn what_others_will_not_accept_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    let (authority, foreign) = (Authority::new(&a), Authority::new(&b));
    let good = authority.issue("node", &local());
    let strange = HttpTls {
        ca: Some(authority.ca().to_owned()),
        ..tls_config(&foreign.issue("node", &local()))
    };
    let expired = tls_config(&authority.issue_expired("old", &local()));
    let no_authority = HttpTls {
        ca: None,
        client_auth: ClientAuth::None,
        ..expired.clone()
    };
    let for_servers = tls_config(&authority.issue_for_servers("server", &local()));
    for (config, host, want) in [
        (tls_config(&good), "elsewhere", "not for elsewhere"),
        (strange, LOCAL, "by an authority that is not in"),
        (expired, LOCAL, "has expired"),
        (no_authority, LOCAL, "has expired"),
        (for_servers, LOCAL, "not for this purpose"),
    ] {
        let flaws = loaded(config).unwrap().flaws(Some(host));
        assert_eq!(flaws.len(), 1, "{want}: {flaws:?}");
        assert!(
            flaws[0].starts_with("http.tls.cert: ") && flaws[0].contains(want),
            "{flaws:?}"
        );
    }
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let (one, two) = (
        authority.issue("one", &local()),
        authority.issue("two", &local()),
    );
    let good = tls_config(&one);
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let (text, huge) = (
        file("text", "hello"),
        file("huge", &"x".repeat((1 << 20) + 1)),
    );
    let broken = file("broken", broken);
    let with = |change: &dyn Fn(&mut HttpTls)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let missing: PathBuf = dir.path().join("missing");
    for (config, want) in [
        (with(&|c| c.cert = missing.clone()), "http.tls.cert: "),
        (
            with(&|c| c.cert = dir.path().to_owned()),
            "it is not a file",
        ),
        (
            with(&|c| c.cert = text.clone()),
            "text: there is no PEM certificate in it",
        ),
        (with(&|c| c.cert = huge.clone()), "huge: it is larger than"),
        (with(&|c| c.cert = broken.clone()), "http.tls.cert: "),
        (with(&|c| c.key = missing.clone()), "http.tls.key: "),
        (
            with(&|c| c.key = one.cert.clone()),
            "one.pem: there is no PEM private key in it",
        ),
        (
            with(&|c| c.key = two.key.clone()),
            "two.key is not the key of the certificate in",
        ),
        (with(&|c| c.ca = Some(text.clone())), "http.tls.ca: "),
        (with(&|c| c.ca = Some(broken.clone())), "http.tls.ca: "),
    ] {
        let problem = refused(config);
        assert!(problem.contains(want), "{problem}: not {want}");
    }
    let key = fs::read_to_string(&one.key).unwrap();
    let secret = key.lines().nth(1).unwrap();
    assert!(!refused(with(&|c| c.cert = one.key.clone())).contains(secret));
}

fn token(name: &str, source: TokenSource, rights: &[Right]) -> TokenConfig {
    TokenConfig {
        name: name.into(),
        source,
        rights: rights.to_vec(),
    }
}

fn auth(send: &str, tokens: Vec<TokenConfig>) -> HttpConfig {
    let send = Some(send.to_owned());
    http_config(None, Some(HttpAuth { send, tokens }))
}

fn shown(text: &str) -> Option<HeaderValue> {
    Some(HeaderValue::try_from(text).unwrap())
}

#[test]
fn a_token_has_its_rights_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&a, format!("{TOKEN}\n\n  {TOKEN}-old \n")).unwrap();
    fs::write(&b, OTHER).unwrap();
    let config = auth(
        "node",
        vec![
            token(
                "node",
                TokenSource::File(a),
                &[Right::Replicate, Right::Read],
            ),
            token("ops", TokenSource::File(b), &[Right::Admin]),
        ],
    );
    let keys = Keys::load(&config).unwrap();
    let tokens = keys.tokens.unwrap();
    let check = |text: &str, right| tokens.check(shown(text).as_ref(), right);
    for text in [
        format!("Bearer {TOKEN}"),
        format!("bearer  {TOKEN}"),
        format!("BEARER {TOKEN}-old"),
    ] {
        assert_eq!(check(&text, Right::Replicate), Ok("node"), "{text}");
        assert_eq!(check(&text, Right::Read), Ok("node"));
        assert_eq!(check(&text, Right::Admin), Err(Denied::Right("node")));
    }
    for right in [Right::Read, Right::Replicate, Right::Admin] {
        assert_eq!(check(&format!("Bearer {OTHER}"), right), Ok("ops"));
        for text in ["", "Bearer", "Bearer ", "Basic eHh4", TOKEN, "Bear"] {
            assert_eq!(check(text, right), Err(Denied::NoToken), "{text}");
        }
        for text in [
            "Bearer x".to_owned(),
            format!("Bearer {}", &TOKEN[1..]),
            format!("Bearer {TOKEN}{TOKEN}"),
            format!("Bearer {}", TOKEN.to_uppercase()),
        ] {
            assert_eq!(check(&text, right), Err(Denied::Unknown), "{text}");
        }
        assert_eq!(tokens.check(None, right), Err(Denied::NoToken));
    }
    let send = tokens.send().unwrap();
    assert_eq!(send, format!("Bearer {TOKEN}"));
    assert!(!format!("{send:?}").contains(TOKEN), "{send:?}");
}

#[test]
fn bad_tokens_are_refused_and_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    for (text, want) in [
        ("", "there is no token in it"),
        ("\n \n", "there is no token in it"),
        ("sesame", "line 1 has 6 characters: a token has 16 to 512"),
        (
            "\nsesame-sesame-sesame sesame",
            "line 2 has other characters",
        ),
        ("sesame-sesame-sesäme", "line 1 has other characters"),
        (&"sesame-".repeat(80), "line 1 has 560 characters"),
        (
            &format!("sesame-{TOKEN}\n").repeat(17),
            "more than 16 tokens",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let tokens = vec![token("a", TokenSource::File(path.clone()), &[Right::Read])];
        let problem = Keys::load(&auth("a", tokens)).err().unwrap().to_string();
        assert!(
            problem.starts_with("http.auth.tokens[0].file: "),
            "{problem}"
        );
        assert!(problem.contains(want), "{problem}: not {want}");
        assert!(!problem.contains("sesame"), "{problem}");
    }
    fs::write(&path, [0xff; 20]).unwrap();
    assert!(tokens::read("x", &path).is_err());
    let unset = TokenSource::Env("TENURE_NO_SUCH_VARIABLE".into());
    let tokens = vec![token("a", unset, &[Right::Read])];
    let problem = Keys::load(&auth("a", tokens)).err().unwrap().to_string();
    assert!(
        problem.contains("the environment has no TENURE_NO_SUCH_VARIABLE"),
        "{problem}"
    );
}

#[test]
fn files_that_everybody_can_read_are_complained_of() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let node = authority.issue("node", &local());
    let path = dir.path().join("token");
    fs::write(&path, TOKEN).unwrap();
    let tokens = vec![token("a", TokenSource::File(path.clone()), &[Right::Read])];
    let mut config = auth("a", tokens);
    config.tls = Some(tls_config(&node));
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (bits, warnings) in [(0o600, 0), (0o640, 0), (0o644, 2)] {
        mode(&path, bits);
        mode(&node.key, bits);
        let said = Keys::load(&config).unwrap().warnings();
        assert_eq!(said.len(), warnings, "{said:?}");
    }
}

#[test]
fn changed_files_are_taken_and_bad_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let node = authority.issue("node", &local());
    let path = dir.path().join("token");
    fs::write(&path, TOKEN).unwrap();
    let tokens = vec![token("a", TokenSource::File(path.clone()), &[Right::Read])];
    let mut config = auth("a", tokens);
    config.tls = Some(tls_config(&node));
    let mut keeper = Keeper::new(&config).unwrap();
    assert!(keeper.look().is_none(), "nothing has changed");
    fs::write(&path, format!("{OTHER}\n{TOKEN}\n")).unwrap();
    let keys = keeper.look().expect("a new token");
    let known = |keys: &Keys, text: &str| {
        let tokens = keys.tokens.as_ref().unwrap();
        tokens
            .check(shown(&format!("Bearer {text}")).as_ref(), Right::Read)
            .is_ok()
    };
    assert!(known(&keys, OTHER) && known(&keys, TOKEN));
    assert!(keeper.look().is_none());
    fs::write(&path, "short").unwrap();
    assert!(keeper.look().is_none() && keeper.look().is_none());
    fs::remove_file(&path).unwrap();
    assert!(keeper.look().is_none());
    fs::write(&path, OTHER).unwrap();
    assert!(!known(&keeper.look().expect("only the new token"), TOKEN));
    // A certificate comes before its key.
    let key = fs::read(&node.key).unwrap();
    authority.issue("node", &local());
    let new_key = fs::read(&node.key).unwrap();
    fs::write(&node.key, key).unwrap();
    assert!(keeper.look().is_none());
    fs::write(&node.key, new_key).unwrap();
    assert!(keeper.look().is_some());
}
