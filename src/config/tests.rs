//! Whole files: what each key does, and what each mistake says.

use std::time::Duration;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    parse_with(text, "t.yml", None)
}

fn refused(text: &str) -> String {
    match parse(text) {
        Ok(config) => panic!("accepted: {text}\n{config:?}"),
        Err(e) => e.to_string(),
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn an_empty_file_is_a_single_static_primary() {
    let c = parse("").unwrap();
    assert_eq!(c.fuse.dir, Path::new("/litefs"));
    assert_eq!(c.data.dir, Path::new("/var/lib/litefs"));
    assert!(c.data.compress && c.exit_on_error && c.lease.candidate);
    assert_eq!(
        (c.data.retention, c.data.retention_monitor_interval),
        (secs(600), secs(60))
    );
    assert_eq!(
        (c.http.addr.as_str(), c.http.snapshot_timeout),
        (":20202", secs(600))
    );
    assert_eq!(
        (c.data.scrub_interval, c.data.scrub_rate),
        (secs(24 * 3600), 4)
    );
    assert_eq!(c.lease.kind, LeaseKind::Static);
    assert_eq!(
        (c.lease.reconnect_delay, c.lease.demote_delay),
        (secs(1), secs(10))
    );
    let name = validate::machine_name().unwrap();
    assert_eq!(c.lease.advertise_url, format!("http://{name}:20202"));
    assert_eq!(c.lease.hostname, name);
    assert_eq!(
        (c.proxy.max_lag, c.proxy.idle_timeout),
        (secs(10), secs(30))
    );
    assert_eq!(c.proxy.forward, ProxyForward::FlyReplay);
    assert_eq!((c.tracing.max_size, c.tracing.max_count), (64, 8));
}

#[test]
fn every_key_is_read() {
    let c = parse(
        "
fuse: {dir: /m, allow-other: true, debug: yes, wal-capture: tail}
data: {dir: /d, compress: false, retention: 1h, retention-monitor-interval: 0, scrub-interval: 12h, scrub-rate: 20}
exec:
  - cmd: migrate up
    if-candidate: true
  - cmd: server
exit-on-error: false
skip-sync: true
strict-verify: true
http:
  addr: '127.0.0.1:8080'
  snapshot-timeout: 90s
  tls: {cert: /hc, key: /hk, ca: /ha, client-auth: none}
  auth:
    send: node
    tokens:
      - {name: node, file: /nt, rights: [replicate, admin]}
      - {name: metrics, env: MT, rights: [read]}
proxy:
  addr: ':8081'
  target: 'localhost:3000'
  db: app.db
  max-lag: 1s
  passthrough: ['/static/*']
  always-forward: ['/w']
  forward: proxy
  primary-redirect-timeout: 2s
  read-timeout: 3s
  read-header-timeout: 4s
  write-timeout: 5s
  idle-timeout: 6s
  debug: true
lease:
  type: consul
  hostname: me
  advertise-url: https://me:8080
  candidate: false
  promote: true
  reconnect-delay: 7s
  demote-delay: 8s
  databases: [a.db, b.db]
  consul: {url: 'http://:tok@c:8500/p', key: k, ttl: 11s, lock-delay: 2s, tls: {ca: /cca}}
  etcd:
    endpoints: ['http://e:2379']
    key: ek
    ttl: 3s
    username: u
    password: p
    tls: {ca: /ca, cert: /cert, key: /key}
backup: {type: file, path: /b}
log: {format: json, timestamp: true, debug: true}
tracing: {enabled: false, path: /t, max-size: 1, max-count: 2, compress: false}
",
    )
    .unwrap();
    let expected = Config {
        fuse: FuseConfig {
            dir: "/m".into(),
            allow_other: true,
            debug: true,
            wal_capture: WalCapture::Tail,
        },
        data: DataConfig {
            dir: "/d".into(),
            compress: false,
            retention: secs(3600),
            retention_monitor_interval: Duration::ZERO,
            scrub_interval: secs(12 * 3600),
            scrub_rate: 20,
        },
        exec: vec![
            ExecConfig {
                cmd: vec!["migrate".into(), "up".into()],
                if_candidate: true,
            },
            ExecConfig {
                cmd: vec!["server".into()],
                if_candidate: false,
            },
        ],
        exit_on_error: false,
        skip_sync: true,
        strict_verify: true,
        http: HttpConfig {
            addr: "127.0.0.1:8080".into(),
            snapshot_timeout: secs(90),
            tls: Some(HttpTls {
                cert: "/hc".into(),
                key: "/hk".into(),
                ca: Some("/ha".into()),
                client_auth: ClientAuth::None,
            }),
            auth: Some(HttpAuth {
                send: Some("node".into()),
                tokens: vec![
                    TokenConfig {
                        name: "node".into(),
                        source: TokenSource::File("/nt".into()),
                        rights: vec![Right::Replicate, Right::Admin],
                    },
                    TokenConfig {
                        name: "metrics".into(),
                        source: TokenSource::Env("MT".into()),
                        rights: vec![Right::Read],
                    },
                ],
            }),
        },
        proxy: ProxyConfig {
            addr: Some(":8081".into()),
            target: Some("localhost:3000".into()),
            db: Some("app.db".into()),
            max_lag: secs(1),
            passthrough: vec!["/static/*".into()],
            always_forward: vec!["/w".into()],
            forward: ProxyForward::Proxy,
            primary_redirect_timeout: secs(2),
            read_timeout: secs(3),
            read_header_timeout: secs(4),
            write_timeout: secs(5),
            idle_timeout: secs(6),
            debug: true,
        },
        lease: LeaseConfig {
            kind: LeaseKind::Consul,
            hostname: "me".into(),
            advertise_url: "https://me:8080".into(),
            candidate: false,
            promote: true,
            reconnect_delay: secs(7),
            demote_delay: secs(8),
            databases: vec!["a.db".into(), "b.db".into()],
            consul: Some(ConsulConfig {
                url: Secret("http://:tok@c:8500/p".into()),
                key: "k".into(),
                ttl: secs(11),
                lock_delay: secs(2),
                tls: Some(TlsConfig {
                    ca: Some("/cca".into()),
                    ..TlsConfig::default()
                }),
            }),
            etcd: Some(EtcdConfig {
                endpoints: vec!["http://e:2379".into()],
                key: "ek".into(),
                ttl: secs(3),
                username: Some("u".into()),
                password: Some(Secret("p".into())),
                tls: Some(TlsConfig {
                    ca: Some("/ca".into()),
                    cert: Some("/cert".into()),
                    key: Some("/key".into()),
                }),
            }),
        },
        backup: Some(BackupConfig { path: "/b".into() }),
        log: LogConfig {
            format: LogFormat::Json,
            timestamp: true,
            debug: true,
        },
        tracing: TracingConfig {
            enabled: false,
            path: Some("/t".into()),
            max_size: 1,
            max_count: 2,
            compress: false,
        },
    };
    assert_eq!(c, expected);
    let shown = format!("{c:?}");
    assert!(!shown.contains("tok@"), "a token in {shown}");
}

#[test]
fn a_static_replica_finds_the_primary() {
    let c = parse("lease: {type: static, candidate: false, advertise-url: 'http://p:1'}").unwrap();
    assert_eq!(c.lease.hostname, "p");
    let c = parse(
        "lease: {type: static, candidate: false, advertise-url: 'http://10.0.0.1:1', hostname: p}",
    )
    .unwrap();
    assert_eq!(c.lease.hostname, "p");
}

#[test]
fn defaults_follow_other_keys() {
    let c = parse("data: {retention: 5m}\nhttp: {addr: ':9'}\nlease: {hostname: h}").unwrap();
    assert_eq!(c.http.snapshot_timeout, secs(300));
    assert_eq!(c.lease.advertise_url, "http://h:9");
    let c = parse("data: {retention: 0}").unwrap();
    assert_eq!(c.http.snapshot_timeout, secs(600));
    let c = parse(r#"exec: 'run "a b" c\ d $X ''e''f'"#).unwrap();
    assert_eq!(c.exec[0].cmd, ["run", "a b", "c d", "$X", "ef"]);
}

#[test]
fn mistakes_are_named_with_file_line_and_key() {
    for (text, expected) in [
        (
            "fuse:\n  dri: /x",
            "t.yml:2: fuse.dri: unknown key; did you mean \"dir\"?",
        ),
        (
            "\nfuze: {}",
            "t.yml:2: fuze: unknown key; did you mean \"fuse\"?",
        ),
        (
            "consul: {}",
            "t.yml:1: consul: unknown key; known here: fuse, data,",
        ),
        (
            "lease:\n  consul:\n    uri: x",
            "t.yml:3: lease.consul.uri: unknown key",
        ),
        (
            "lease:\n  advertise_url: x",
            "did you mean \"advertise-url\"?",
        ),
        (
            "exec:\n  - command: x",
            "t.yml:2: exec[0].command: unknown key",
        ),
        ("a: ]", "t.yml:1: not valid YAML"),
        ("fuse: 1", "t.yml:1: fuse: must be a mapping"),
        ("- a", "must be a mapping"),
        (
            "fuse: {dir: [a]}",
            "t.yml:1: fuse.dir: must be a single value",
        ),
        (
            "fuse: {wal-capture: fast}",
            "fuse.wal-capture: must be gate or tail, not \"fast\"",
        ),
        ("fuse: {dir: ''}", "fuse.dir: must not be empty"),
        (
            "fuse:\n  allow-other: maybe",
            "t.yml:2: fuse.allow-other: must be true or false",
        ),
        (
            "data:\n  retention: 10",
            "t.yml:2: data.retention: \"10\" is no duration",
        ),
        ("data: {retention: -1s}", "negative"),
        ("data: {scrub-rate: 0}", "from 1 to"),
        ("data: {scrub-rate: fast}", "whole number"),
        (
            "http: {addr: localhost}",
            "t.yml:1: http.addr: must be HOST:PORT",
        ),
        ("log: {format: xml}", "log.format: must be text or json"),
        (
            "tracing: {max-size: 1.5}",
            "tracing.max-size: must be a whole number",
        ),
        ("tracing: {max-size: 0}", "tracing.max-size: must be 1"),
        ("exec: ''", "exec: a command is empty"),
        ("exec: '# nothing'", "exec: a command is empty"),
        (
            "a: 1\nexec: 'sh -c \"x'",
            "t.yml:2: exec: a quote is not closed",
        ),
        ("exec: [{if-candidate: true}]", "exec: a command is empty"),
        ("exec: {cmd: x}", "exec: must be a command line or a list"),
        ("proxy: {target: 'a:1', db: d}", "proxy.addr: is missing"),
        ("proxy: {target: 'a:1', addr: ':1'}", "proxy.db: is missing"),
        (
            "proxy: {target: 'http://a:1'}",
            "proxy.target: must be HOST:PORT",
        ),
        (
            "proxy: {target: 'a:0', addr: ':1', db: d}",
            "proxy.target: must name the port",
        ),
        (
            "proxy: {target: 'a:1', addr: ':0', db: d, forward: redirect}",
            "proxy.addr: must name a port",
        ),
        (
            "proxy: {forward: replay}",
            "t.yml:1: proxy.forward: must be fly-replay, proxy or redirect, not \"replay\"",
        ),
        (
            "proxy: {passthrough: '/x'}",
            "proxy.passthrough: must be a list",
        ),
        (
            "data: {dir: /a/b/..}\nfuse: {dir: /a}",
            "t.yml:1: data.dir: must differ from fuse.dir",
        ),
        (
            "data: {dir: /a/b}\nfuse: {dir: /a}",
            "data.dir: must not lie within fuse.dir",
        ),
        (
            "lease: {type: zookeeper}",
            "lease.type: must be static, consul or etcd",
        ),
        ("lease: {candidate: false}", "lease.type: is missing"),
        (
            "lease: {consul: {url: 'http://c', key: k}}",
            "lease.type: is missing",
        ),
        (
            "lease: {type: static, candidate: false}",
            "lease.advertise-url: is missing",
        ),
        (
            "lease: {advertise-url: 'host:1'}",
            "lease.advertise-url: must be a URL",
        ),
        (
            "lease: {hostname: 'a b'}",
            "lease.hostname: must not contain",
        ),
        (
            "lease:\n  databases: [a]",
            "t.yml:2: lease.databases: a node that replicates some",
        ),
        (
            "http:\n  tls: {cert: /c}",
            "t.yml:2: http.tls.key: is missing",
        ),
        (
            "http: {tls: {key: /c}}",
            "t.yml:1: http.tls.cert: is missing",
        ),
        (
            "http:\n  auth:\n    tokens:\n      - {name: a, env: A, rights: [read]}\n      - {name: b, env: A}",
            "t.yml:5: http.auth.tokens[1].rights: is missing",
        ),
        (
            "http:\n  tls:\n    cert: /c\n    key: /k\n    clientauth: none",
            "t.yml:5: http.tls.clientauth: unknown key; did you mean \"client-auth\"?",
        ),
        (
            "http: {tls: {cert: /c, key: /k, client-auth: optional}}",
            "http.tls.client-auth: must be none or required, not \"optional\"",
        ),
        (
            "http: {tls: {cert: /c, key: /k, client-auth: required}}",
            "http.tls.client-auth: required needs http.tls.ca",
        ),
        (
            "http: {tls: {cert: /c, key: /k}}\nlease:\n  advertise-url: http://h:1",
            "t.yml:3: lease.advertise-url: must begin with https",
        ),
        (
            "lease: {type: static, candidate: false, advertise-url: 'https://p:1'}",
            "lease.advertise-url: begins with https, and there is no http.tls",
        ),
        (
            "lease: {advertise-url: 'http://u:sesame@h:1'}",
            "lease.advertise-url: must not hold a user or a password",
        ),
        ("http: {auth: {}}", "t.yml:1: http.auth.tokens: is missing"),
        (
            "http: {auth: {tokens: {a: b}}}",
            "http.auth.tokens: must be a list",
        ),
        (
            "http:\n  auth:\n    tokens:\n      - {name: a, token: sesame, rights: [read]}",
            "t.yml:4: http.auth.tokens[0].file: say either file or env",
        ),
        (
            "http: {auth: {tokens: [{name: 'a b', env: A, rights: [read]}]}}",
            "http.auth.tokens[0].name: must be a name",
        ),
        (
            "http: {auth: {tokens: [{name: a, env: A}]}}",
            "http.auth.tokens[0].rights: is missing",
        ),
        (
            "http: {auth: {tokens: [{name: a, env: A, rights: [write]}]}}",
            "http.auth.tokens[0].rights: must be read, replicate or admin, not \"write\"",
        ),
        (
            "http: {auth: {tokens: [{name: a, env: A, rights: [read]}, {name: a, env: B, rights: [read]}]}}",
            "http.auth.tokens[1].name: \"a\" is the name of another token",
        ),
        (
            "http: {auth: {send: b, tokens: [{name: a, env: A, rights: [read]}]}}",
            "http.auth.send: there is no token \"b\", but: a",
        ),
        (
            "http: {auth: {tokens: [{name: a, env: A, rights: [read]}]}}\nlease: {type: static, candidate: false, advertise-url: 'http://p:1'}",
            "http.auth.send: is missing: the name of the token that this node shows to the others, one of: a",
        ),
        (
            "lease: {type: etcd, etcd: {endpoints: ['http://u:sesame@e'], key: k}}",
            "lease.etcd.endpoints: must not hold a user",
        ),
        ("lease: {type: consul}", "lease.consul: is missing"),
        (
            "lease: {type: consul, consul: {url: 'x', key: k}}",
            "lease.consul.url: ",
        ),
        (
            "lease: {type: consul, consul: {url: 'http://c'}}",
            "lease.consul.key: is missing",
        ),
        (
            "lease: {type: consul, consul: {url: 'http://c', key: k, ttl: 9s}}",
            "lease.consul.ttl: must be from 10s",
        ),
        ("lease: {type: etcd}", "lease.etcd: is missing"),
        (
            "lease: {type: etcd, etcd: {key: k}}",
            "lease.etcd.endpoints: must be a list of URLs",
        ),
        (
            "lease: {type: etcd, etcd: {endpoints: ['http://e'], key: k, ttl: 2500ms}}",
            "lease.etcd.ttl: must be whole seconds",
        ),
        (
            "lease: {type: etcd, etcd: {endpoints: ['http://e'], key: k, tls: {cert: /c}}}",
            "cert and key must be given together",
        ),
        (
            "backup: {type: litefs-cloud, auth-token: x}",
            "has been shut down",
        ),
        ("backup: {type: file}", "backup.path: is missing"),
        ("backup: {type: s3}", "backup.type: must be file"),
    ] {
        let message = refused(text);
        assert!(
            message.contains(expected),
            "{text}\n gave {message}\n not {expected}"
        );
        assert!(!message.contains("sesame"), "a secret in {message}");
    }
}

#[test]
fn tls_and_tokens_follow_other_keys() {
    let tls = "tls: {cert: /c, key: /k";
    let c = parse(&format!("http: {{{tls}}}}}\nlease: {{hostname: h}}")).unwrap();
    assert_eq!(c.lease.advertise_url, "https://h:20202");
    assert_eq!(c.http.tls.unwrap().client_auth, ClientAuth::None);
    let c = parse(&format!("http: {{{tls}, ca: /a}}}}")).unwrap();
    assert_eq!(c.http.tls.unwrap().client_auth, ClientAuth::Required);
    let c = parse(&format!("http: {{{tls}, ca: /a, client-auth: none}}}}")).unwrap();
    assert_eq!(c.http.tls.unwrap().client_auth, ClientAuth::None);
    // A static primary calls nobody.
    let token = "{name: a, env: A, rights: [read]}";
    let c = parse(&format!("http: {{auth: {{tokens: [{token}]}}}}")).unwrap();
    assert_eq!(c.http.auth.unwrap().send, None);
}

#[test]
fn variables_are_expanded_unless_that_is_off() {
    let text = "fuse: {dir: /$APP}\nlease: {candidate: \"${REGION == 'lhr'}\"}";
    let lookup = |name: &str| match name {
        "APP" => Some("app".to_owned()),
        "REGION" => Some("lhr".to_owned()),
        _ => None,
    };
    let c = parse_with(text, "t.yml", Some(&lookup)).unwrap();
    assert_eq!(c.fuse.dir, Path::new("/app"));
    assert!(c.lease.candidate);
    let c = Config::parse("fuse: {dir: /$APP}", "t.yml", false).unwrap();
    assert_eq!(c.fuse.dir, Path::new("/$APP"));
    let e = Config::parse("a: 1\nb: ${X", "t.yml", true).unwrap_err();
    assert!(e.to_string().starts_with("t.yml:2: "), "{e}");
    let c = Config::parse("lease: {hostname: $HOSTNAME}", "t.yml", true).unwrap();
    assert!(!c.lease.hostname.is_empty());
}

#[test]
fn a_directory_alone_is_a_single_node() {
    let c = Config::single(Path::new("/srv/x/../mnt")).unwrap();
    assert_eq!(c.fuse.dir, Path::new("/srv/mnt"));
    assert_eq!(c.data.dir, Path::new("/srv/.mnt"));
    assert_eq!(c.lease.kind, LeaseKind::Static);
    assert!(c.lease.candidate && c.advertises_itself());
    let e = Config::single(Path::new("/")).unwrap_err().to_string();
    assert!(e.contains("cannot mount at /"), "{e}");
}

#[test]
fn files_are_read_with_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.yml");
    let e = Config::load(Some(&path), true).unwrap_err().to_string();
    assert!(e.contains("x.yml") && e.contains("cannot read"), "{e}");
    fs::write(&path, "fuse: {dri: 1}").unwrap();
    let e = Config::load(Some(&path), true).unwrap_err().to_string();
    assert!(e.contains("x.yml:1: fuse.dri"), "{e}");
    fs::write(&path, "#".repeat(MAX_FILE_SIZE as usize + 1)).unwrap();
    let e = Config::load(Some(&path), true).unwrap_err().to_string();
    assert!(e.contains("larger than"), "{e}");
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(Config::load(Some(&path), true).is_err());
}

#[test]
fn the_examples_are_valid() {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/config-examples"));
    let mut seen = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yml") {
            Config::load(Some(&path), true).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 3, "only {seen} examples in {}", dir.display());
}
