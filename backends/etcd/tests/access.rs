//! Who may do what: passwords, permissions, certificates, and keys that belong to something else.

use std::net::Ipv4Addr;

use tenure_lease::{LeaseError, Leaser};
use tenure_lease_etcd::{EtcdLeaser, EtcdOptions, Tls};
use tenure_test_services::etcd::{self, Etcd};
use tenure_test_services::tls::{Authority, Identity};

mod common;

use common::{every_call, fatal, leaser, node, options, settled};

fn with_password() -> Etcd {
    Etcd::start_with(etcd::EtcdOptions {
        auth: Some(("tenure".into(), "secret".into())),
        prefix: "tenure".into(),
        ..etcd::EtcdOptions::default()
    })
}

fn user(etcd: &Etcd, name: &str, password: &str) -> EtcdOptions {
    EtcdOptions {
        username: Some(name.into()),
        password: Some(password.into()),
        ..options(&[etcd.endpoint()], "tenure", "a")
    }
}

/// Makes the user anew, with this password.
fn set_password(etcd: &Etcd, password: &str) {
    etcd.ctl(&["user", "delete", "tenure"]);
    etcd.ctl(&["user", "add", &format!("tenure:{password}")]);
    etcd.ctl(&["user", "grant-role", "tenure", "tenure"]);
}

/// All calls succeed, or say what they say where all is well.
async fn works(leaser: &EtcdLeaser) {
    let lease = leaser.acquire().await.expect("acquiring");
    leaser.primary_info().await.expect("reading the primary");
    lease.renew().await.expect("renewing");
    lease.record(Default::default()).await.expect("recording");
    lease.close().await.expect("giving the lease up");
    for (name, result) in every_call(leaser).await {
        match result {
            Ok(()) => {}
            Err(LeaseError::LeaseExpired) if name == "acquire_existing" => {}
            Err(e) => panic!("{name}: {e}"),
        }
    }
    leaser.close().await.expect("closing");
}

#[tokio::test]
async fn the_right_password_opens_everything_that_is_needed() {
    let etcd = with_password();
    works(&leaser(user(&etcd, "tenure", "secret"))).await;
}

#[tokio::test]
async fn a_wrong_password_or_none_is_reported_as_that() {
    let etcd = with_password();
    for options in [
        user(&etcd, "tenure", "wrong"),
        user(&etcd, "nobody", "secret"),
        options(&[etcd.endpoint()], "tenure", "a"),
    ] {
        let leaser = leaser(options);
        for (name, result) in every_call(&leaser).await {
            // An ID that is no lease is not looked up with a password that is wrong, either.
            let message = fatal(result);
            assert!(
                message.contains("password") || message.contains("user name is empty"),
                "{name}: {message}"
            );
            assert!(message.contains(&etcd.endpoint()), "{name}: {message}");
        }
        fatal(leaser.watch_primary().await);
    }
}

#[tokio::test]
async fn a_password_that_is_right_in_the_end_needs_no_restart() {
    let etcd = with_password();
    let leaser = leaser(user(&etcd, "tenure", "new"));
    fatal(leaser.primary_info().await);
    set_password(&etcd, "new");
    works(&leaser).await;
}

#[tokio::test]
async fn a_missing_permission_is_reported_with_the_key() {
    let etcd = with_password();
    let leaser = leaser(EtcdOptions {
        key: "other".into(),
        ..user(&etcd, "tenure", "secret")
    });
    for (name, result) in every_call(&leaser).await {
        let message = fatal(result);
        let says = message.contains("permission denied") && message.contains("etcd key other");
        assert!(says, "{name}: {message}");
    }
    fatal(leaser.watch_primary().await);
}

#[tokio::test]
async fn a_token_that_is_no_longer_known_is_replaced() {
    let etcd = with_password();
    let leaser = leaser(user(&etcd, "tenure", "secret"));
    let lease = leaser.acquire().await.expect("acquiring");
    leaser.primary_info().await.expect("reading");
    // A user that is made anew has no token; the connection stays.
    set_password(&etcd, "secret");
    lease.renew().await.expect("renewing with a new token");
    // And with a restart they are lost altogether.
    etcd.kill();
    etcd.start_again();
    settled(|| lease.renew())
        .await
        .expect("renewing after a restart");
    leaser.primary_info().await.expect("reading");
}

struct Secure {
    etcd: Etcd,
    client: Identity,
    stranger: Identity,
    _dir: tempfile::TempDir,
}

/// An etcd with TLS, a client's certificate, and one of another authority.
fn secure() -> Secure {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new(dir.path());
    let etcd = Etcd::start_with(etcd::EtcdOptions {
        tls: Some(authority.issue("server", &[Ipv4Addr::LOCALHOST.into()])),
        ..etcd::EtcdOptions::default()
    });
    let elsewhere = dir.path().join("other");
    std::fs::create_dir(&elsewhere).expect("a directory");
    Secure {
        etcd,
        client: authority.issue("client", &[]),
        stranger: Authority::new(&elsewhere).issue("client", &[]),
        _dir: dir,
    }
}

fn with_tls(etcd: &Etcd, ca: &Identity, own: Option<&Identity>) -> EtcdOptions {
    EtcdOptions {
        tls: Tls {
            ca: Some(ca.ca.clone()),
            cert: own.map(|own| own.cert.clone()),
            key: own.map(|own| own.key.clone()),
        },
        ..options(&[etcd.endpoint()], "tenure", "a")
    }
}

#[tokio::test]
async fn tls_with_a_private_authority_and_a_client_certificate_works() {
    let secure = secure();
    let (etcd, client) = (&secure.etcd, &secure.client);
    works(&leaser(with_tls(etcd, client, Some(client)))).await;
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_reported_as_that() {
    let secure = secure();
    let (etcd, client, stranger) = (&secure.etcd, &secure.client, &secure.stranger);
    for (what, options) in [
        ("etcd's", with_tls(etcd, stranger, Some(client))),
        ("the client's", with_tls(etcd, client, Some(stranger))),
        ("no client's", with_tls(etcd, client, None)),
        (
            "etcd's, by the system",
            options(&[etcd.endpoint()], "tenure", "a"),
        ),
    ] {
        let leaser = leaser(options);
        // A client whose certificate is refused (TLS 1.3) may find the connection closed before it
        // has read why.
        let message = fatal(settled(|| leaser.primary_info()).await);
        let says = message.to_lowercase().contains("certificate");
        assert!(says, "{what}: {message}");
    }
}

#[tokio::test]
async fn pem_files_are_read_when_a_connection_is_made() {
    let secure = secure();
    let missing = EtcdOptions {
        tls: Tls {
            ca: Some("/nowhere/ca.pem".into()),
            ..Tls::default()
        },
        ..options(&[secure.etcd.endpoint()], "tenure", "a")
    };
    let Err(e) = EtcdLeaser::new(missing) else {
        panic!("made without its certificates");
    };
    assert!(e.to_string().contains("/nowhere/ca.pem"), "{e}");

    let (client, stranger) = (&secure.client, &secure.stranger);
    let leaser = leaser(with_tls(&secure.etcd, stranger, Some(client)));
    fatal(leaser.primary_info().await);
    std::fs::copy(&client.ca, &stranger.ca).expect("replacing the authority");
    works(&leaser).await;
}

#[tokio::test]
async fn a_key_that_something_else_uses_is_named_and_left_alone() {
    let etcd = Etcd::start();
    let granted = etcd.ctl(&["lease", "grant", "600"]);
    let lease = granted.split(' ').nth(1).expect("a lease ID");
    let primary = r#"{"hostname":"b","advertise-url":"http://b:20202"}"#;
    let leaser = node(etcd.endpoint());
    for put in [
        vec!["put", "tenure", "a value of something else"],
        vec![
            "put",
            "tenure",
            "a value of something else",
            "--lease",
            lease,
        ],
        vec!["put", "tenure", primary],
    ] {
        etcd.ctl(&put);
        for message in [
            fatal(leaser.primary_info().await),
            fatal(leaser.acquire().await.map(drop)),
        ] {
            let says = message.contains("etcd key tenure:") || message.contains("etcd key tenure ");
            assert!(says && message.contains("something else"), "{message}");
        }
        assert_eq!(
            etcd.ctl(&["get", "tenure", "--print-value-only"]).trim(),
            put[2]
        );
    }
    etcd.ctl(&["del", "tenure"]);
    works(&leaser).await;

    etcd.ctl(&["put", "tenure/clusterid", "x"]);
    etcd.ctl(&["put", "tenure/recorded", "x"]);
    etcd.ctl(&["put", "tenure/candidates/x", "x"]);
    let id = "LFSC0123456789ABCDEF";
    for message in [
        fatal(leaser.cluster_id().await),
        fatal(leaser.set_cluster_id(id).await),
    ] {
        assert!(message.contains("tenure/clusterid"), "{message}");
    }
    let message = fatal(leaser.recorded().await);
    assert!(message.contains("tenure/recorded"), "{message}");
    assert_eq!(leaser.candidates().await.expect("reading"), []);
}
