// Package collector takes the records of nodes, keeps each exactly once, and answers questions about
// them.
//
// A record is keyed by the node in the peer's certificate, the epoch of the node's store, its class
// and its number, and a batch is taken only if it continues its sequence. The number up to which the
// collector has everything is written in the transaction that writes the records, so that what is
// acknowledged, what is answered to a returning node and what is in the tables cannot differ.
//
// Records lie in one SQLite file per day of receipt, or in one partition per day of a PostgreSQL database, which several collectors may share. A day is
// dropped by removing its file or its partitions.
//
// Each sealed batch, each grant event and each node's key is a leaf of one transparency log. Its hashes and its signed checkpoint are
// written with the records. A day that goes leaves its hashes behind, so that the log is proven to have only grown for ever.
package collector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Source gives the collector's own X.509 identity and the bundles that it trusts.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config of a Collector.
type Config struct {
	Dir         string // of the log's key and of the daily files; created with mode 0700
	TrustDomain spiffeid.TrustDomain
	Source      Source
	Listen      string // host:port for nodes and remote readers
	// Postgres is where a database keeps the records, as a URL or as key=value; empty: daily files. Several collectors with the same log.key may
	// share one. CheckPostgres tells what is wrong with it.
	Postgres string
	// Readers are SPIFFE IDs that may read over the network: exact, or a prefix of whole segments
	// ending in "/*".
	Readers []string
	// Actors are SPIFFE IDs, written as Readers are, that may have nodes end grants, and hand in statements. Who reads alone may not, and
	// who acts does not read by that.
	Actors []string
	// Socket is a Unix socket for local readers and actors; empty: none. SocketUIDs may use it, empty: 0.
	Socket     string
	SocketUIDs []uint32
	// Retain is how long a day is kept after it ended; 0: for ever.
	Retain time.Duration
	// Limits of each node.
	Limits Limits
	// Metrics is the host:port that serves Prometheus metrics over plain HTTP; empty: none.
	Metrics string
	// Console is where browsers are served, by mutual TLS: Readers may look, and those of them who are Actors may act.
	Console Console
	// Now is the wall clock that chooses the daily file; nil: time.Now.
	Now func() time.Time
	// Boot is the time since boot, which nobody sets; nil: CLOCK_BOOTTIME. Days are dropped only while Now keeps to it.
	Boot   func() time.Duration
	Logger *slog.Logger // nil: slog.Default

	growEvery time.Duration // between checkpoints to a node, while the log grows; 0: as usual
	proofTTL  time.Duration // of a connection; 0: as usual
}

// stopTimeout bounds how long a peer can hold up a stop.
const stopTimeout = 5 * time.Second

// maxFrame bounds one message of a node; the largest entry is an envelope that the agent's socket took.
const maxFrame = 16 << 20

// Collector serves nodes and readers. Make it with New, then Run it once.
type Collector struct {
	cfg    Config
	log    *slog.Logger
	engine engine
	write  *writer
	peers  peers

	nodes  *nodes
	meters *meters

	tcp, unix, metrics, console net.Listener
}

// New opens the daily files and the listeners. If Run is not going to be called, call Close.
// ErrInUse says that the directory is another collector's.
func New(cfg Config) (_ *Collector, err error) {
	if cfg.Dir == "" || cfg.Source == nil || cfg.TrustDomain.IsZero() || cfg.Listen == "" {
		return nil, errors.New("create collector: directory, identity source, trust domain and listen address are needed")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Boot == nil {
		cfg.Boot = bootTime
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	c := &Collector{cfg: cfg, log: cfg.Logger, nodes: newNodes(cfg.Limits, cfg.Boot, cfg.Logger), meters: newMeters()}
	defer func() {
		if err != nil {
			c.Close()
			err = fmt.Errorf("create collector: %w", err)
		}
	}()
	if c.peers, err = newPeers(cfg.TrustDomain, cfg.Readers, cfg.Actors); err != nil {
		return nil, err
	}
	var key logKey
	if c.engine, key, err = openEngine(cfg); err != nil {
		return nil, err
	}
	c.write = newWriter(c.engine, key)
	if err := c.nodes.remember(context.Background(), c.engine); err != nil {
		return nil, err
	}
	return c, c.listen()
}

// openEngine takes what is stored, with the key of its log.
func openEngine(cfg Config) (engine, logKey, error) {
	if cfg.Postgres != "" {
		return openPostgres(context.Background(), cfg)
	}
	d, err := openDays(cfg)
	if err != nil {
		return nil, logKey{}, err
	}
	e, err := openSQLite(context.Background(), d, cfg.TrustDomain)
	if err != nil {
		return nil, logKey{}, errors.Join(err, d.close())
	}
	return e, e.key, nil
}

func (c *Collector) listen() (err error) {
	if c.tcp, err = net.Listen("tcp", c.cfg.Listen); err != nil {
		return err
	}
	if c.cfg.Socket != "" {
		if c.unix, err = listenUnix(c.cfg.Socket); err != nil {
			return err
		}
	}
	if c.cfg.Metrics != "" {
		if c.metrics, err = net.Listen("tcp", c.cfg.Metrics); err != nil {
			return err
		}
	}
	if c.cfg.Console.Listen != "" {
		c.console, err = net.Listen("tcp", c.cfg.Console.Listen)
	}
	return err
}

// Addr is where nodes and remote readers are served.
func (c *Collector) Addr() net.Addr { return c.tcp.Addr() }

// ConsoleAddr is where browsers are served, or nil.
func (c *Collector) ConsoleAddr() net.Addr {
	if c.console == nil {
		return nil
	}
	return c.console.Addr()
}

// Close gives back what New took. Run does it too.
func (c *Collector) Close() error {
	var errs []error
	for _, l := range []net.Listener{c.tcp, c.unix, c.metrics, c.console} {
		if l != nil {
			if err := l.Close(); !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	if c.engine != nil {
		errs = append(errs, c.engine.close())
	}
	return errors.Join(errs...)
}

// Run serves until the context ends. What was acknowledged by then is durable; streams are ended, and
// nodes take up their sequence at the next collector.
func (c *Collector) Run(ctx context.Context) error {
	stop, stopped := context.WithCancel(ctx)
	defer stopped()
	servers, browsers := c.servers(stop)
	failed := make(chan error, len(servers)+2)
	var serving, writing sync.WaitGroup
	beside := func(l net.Listener, serve func(context.Context, net.Listener) error) {
		if l == nil {
			return
		}
		serving.Go(func() {
			if err := serve(stop, l); err != nil {
				failed <- err
			}
		})
	}
	beside(c.metrics, c.serveMetrics)
	beside(c.console, func(ctx context.Context, l net.Listener) error { return c.serveConsole(ctx, l, browsers) })
	for l, s := range servers {
		serving.Go(func() { failed <- s.Serve(l) })
	}
	writing.Go(func() { c.write.run() })
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	stopped()
	defer time.AfterFunc(stopTimeout, c.write.abort).Stop() // a database that hangs: what was not acknowledged comes again
	for _, s := range servers {
		hard := time.AfterFunc(stopTimeout, s.Stop)
		s.GracefulStop() // the handlers end by stop
		hard.Stop()
	}
	serving.Wait()
	c.write.stop()
	writing.Wait()
	return errors.Join(err, c.Close())
}

// servers are those of nodes and of readers. Browsers are answered by a service of their own.
func (c *Collector) servers(stop context.Context) (_ map[net.Listener]*grpc.Server, browsers *query) {
	authorise := tlsconfig.AdaptMatcher(func(id spiffeid.ID) error { return c.peers.handshake(id) })
	age := c.cfg.proofTTL
	if age == 0 {
		age = proofTTL
	}
	remote := newServer(grpccredentials.MTLSServerCredentials(c.cfg.Source, c.cfg.Source, authorise), age)
	ingest := newIngest(stop, c.write, c.peers, c.nodes, c.meters, c.log)
	if c.cfg.growEvery > 0 {
		ingest.every = c.cfg.growEvery
	}
	api.RegisterAuditIngestServer(remote, ingest)
	service := &query{stop: stop, engine: c.engine, key: c.write.key, connected: ingest.connected, admit: c.peers.reader, proof: proofTTL,
		acts: ingest.actsOf(c.peers.actor)}
	api.RegisterAuditServer(remote, service)
	servers := map[net.Listener]*grpc.Server{c.tcp: remote}
	if c.unix != nil {
		local := newServer(newPeerCred(c.cfg.SocketUIDs), 0)
		api.RegisterAuditServer(local, &query{stop: stop, engine: c.engine, key: c.write.key, connected: ingest.connected, admit: func(context.Context) error { return nil },
			acts: ingest.actsOf(localActor)})
		servers[c.unix] = local
	}
	return servers, c.peers.browsers(service, ingest)
}

// newServer takes no new call on a connection that is of an age: who it is was proven when it began. What is under way then has as long again. 0: none is too old.
func newServer(creds credentials.TransportCredentials, age time.Duration) *grpc.Server {
	return grpc.NewServer(grpc.Creds(creds), grpc.MaxRecvMsgSize(maxFrame), grpc.MaxConcurrentStreams(64), grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionAge: age, MaxConnectionAgeGrace: age}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}))
}
