package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// benchProxyCommand makes the test binary a part of the proxies' benchmark: its service, its client, or a bare forwarder. The
// argument is a role in JSON.
const benchProxyCommand = "bench-proxy"

// role is what a process of the benchmark does.
type role struct {
	Do  string         // service, forward, or a kind of load
	At  netip.AddrPort // where it listens, or what it connects to
	PEM string         // folder with svid.pem and bundle.pem

	To       netip.AddrPort // of forward: the service; invalid: where the client wanted to go, from the client's address
	Identity bool           // of forward: verifies as SPIFFE says, and not a chain alone

	Time        time.Duration // of a load
	Connections int           // of a load, at a time
}

// gauged is what a load reports. What is not measured is 0.
type gauged struct {
	PerSecond float64       // of connections or requests
	Bits      float64       // a second
	P50, P99  time.Duration // of requests
	Done      int           // connections, requests or bytes
}

func runBenchProxy(text string) int {
	var r role
	err := json.Unmarshal([]byte(text), &r)
	if err == nil {
		err = r.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-proxy:", err)
		return 1
	}
	return 0
}

func (r role) run() error {
	switch r.Do {
	case "service":
		return r.serve(nil, benchAnswer)
	case "forward":
		return r.forward()
	}
	config, err := r.client()
	if err != nil {
		return err
	}
	if r.Do == "idle" {
		return r.idle(config)
	}
	g, err := map[string]func(*tls.Config) (gauged, error){
		"handshakes": r.handshakes, "upload": r.upload, "download": r.download, "requests": r.requests,
	}[r.Do](config)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(g)
}

// serve accepts until the process is killed. It is plain TCP, not MPTCP.
func (r role) serve(control func(string, string, syscall.RawConn) error, handle func(*net.TCPConn)) error {
	lc := net.ListenConfig{Control: control}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", r.At.String())
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go handle(c.(*net.TCPConn))
	}
}

// What the first byte of a connection asks of the service.
const (
	askEcho   = 'e' // every byte comes back
	askSink   = 's' // a byte comes back for each sinkUnit
	askSource = 'd' // bytes come without end
)

// sinkUnit is what the service acknowledges: half-closed connections are not everybody's.
const sinkUnit = 64 << 10

func benchAnswer(c *net.TCPConn) {
	defer c.Close()
	buf := make([]byte, 256<<10)
	if _, err := io.ReadFull(c, buf[:1]); err != nil {
		return
	}
	switch buf[0] {
	case askSink:
		for left := sinkUnit; ; {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			for left -= n; left <= 0; left += sinkUnit {
				_, _ = c.Write(buf[:1]) // the client counts
			}
		}
	case askSource:
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	default:
		_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	}
}

// forward is a forwarder as short as Go has it: no policy, no records, no limits.
func (r role) forward() error {
	config, err := r.server()
	if err != nil {
		return err
	}
	control := transparent
	if r.To.IsValid() {
		control = nil
	}
	return r.serve(control, func(c *net.TCPConn) {
		defer c.Close()
		secured := tls.Server(c, config)
		if secured.Handshake() != nil {
			return
		}
		up, err := r.dialService(c)
		if err != nil {
			return
		}
		defer up.Close()
		go func() {
			_, _ = io.Copy(up, secured)
			_ = up.(*net.TCPConn).CloseWrite()
		}()
		_, _ = io.Copy(secured, up)
	})
}

func (r role) dialService(c *net.TCPConn) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	if r.To.IsValid() {
		return d.Dial("tcp4", r.To.String())
	}
	d.Control = transparent
	d.LocalAddr = &net.TCPAddr{IP: c.RemoteAddr().(*net.TCPAddr).IP}
	return d.Dial("tcp4", c.LocalAddr().String())
}

// transparent sockets have addresses that are not the machine's, and choose their port at connect.
func transparent(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	}), err)
}

func (r role) load() (*x509svid.SVID, *x509bundle.Bundle, error) {
	svid, err := x509svid.Load(filepath.Join(r.PEM, "svid.pem"), filepath.Join(r.PEM, "svid.pem"))
	if err != nil {
		return nil, nil, err
	}
	bundle, err := x509bundle.Load(domain, filepath.Join(r.PEM, "bundle.pem"))
	return svid, bundle, err
}

func (r role) server() (*tls.Config, error) {
	svid, bundle, err := r.load()
	if err != nil {
		return nil, err
	}
	config := tlsconfig.MTLSServerConfig(svid, bundle, tlsconfig.AuthorizeAny())
	if !r.Identity {
		pool := x509.NewCertPool()
		for _, authority := range bundle.X509Authorities() {
			pool.AddCert(authority)
		}
		config = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, Certificates: []tls.Certificate{certificate(svid)}}
	}
	config.MinVersion, config.SessionTicketsDisabled = tls.VersionTLS13, true
	return config, nil
}

func certificate(svid *x509svid.SVID) tls.Certificate {
	c := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, cert := range svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// client has one key exchange for all: a peer need not know the newest. Nothing is resumed.
func (r role) client() (*tls.Config, error) {
	svid, bundle, err := r.load()
	if err != nil {
		return nil, err
	}
	config := tlsconfig.MTLSClientConfig(svid, bundle, tlsconfig.AuthorizeID(proxyID))
	config.MinVersion, config.CurvePreferences = tls.VersionTLS13, []tls.CurveID{tls.X25519}
	return config, nil
}

// dial connects, asks and does not wait for the answer. Every contender must do the same cryptography.
func (r role) dial(config *tls.Config, ask byte) (*tls.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	raw, err := d.Dial("tcp4", r.At.String())
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, config)
	err = c.Handshake()
	if s := c.ConnectionState(); err == nil && (s.CipherSuite != tls.TLS_AES_128_GCM_SHA256 || s.CurveID != tls.X25519 || s.DidResume) {
		err = fmt.Errorf("%s, %s, resumed %v is not what is compared", tls.CipherSuiteName(s.CipherSuite), s.CurveID, s.DidResume)
	}
	if err == nil {
		_, err = c.Write([]byte{ask})
	}
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return c, nil
}

// exchange sends bytes and waits until as many have come back.
func exchange(c net.Conn, buf []byte) error {
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

// handshakes counts connections that were made, served a byte and closed.
func (r role) handshakes(config *tls.Config) (gauged, error) {
	var done atomic.Int64
	began := time.Now()
	err := r.each(func() error {
		for time.Since(began) < r.Time {
			c, err := r.dial(config, askEcho)
			if err != nil {
				return err
			}
			if err := errors.Join(exchange(c, []byte{1}), c.Close()); err != nil {
				return err
			}
			done.Add(1)
		}
		return nil
	})
	n := int(done.Load())
	return gauged{Done: n, PerSecond: float64(n) / time.Since(began).Seconds()}, err
}

func (r role) each(f func() error) error {
	var all errgroup.Group
	for range r.Connections {
		all.Go(f)
	}
	return all.Wait()
}

// upload counts what the service has received.
func (r role) upload(config *tls.Config) (gauged, error) {
	c, err := r.dial(config, askSink)
	if err != nil {
		return gauged{}, err
	}
	defer c.Close()
	go func() {
		for buf := make([]byte, 256<<10); ; {
			if _, err := c.Write(buf); err != nil {
				return // closed: the time is over
			}
		}
	}()
	return r.gauge(c, sinkUnit)
}

// download counts what comes.
func (r role) download(config *tls.Config) (gauged, error) {
	c, err := r.dial(config, askSource)
	if err != nil {
		return gauged{}, err
	}
	defer c.Close()
	return r.gauge(c, 1)
}

// gauge reads until its time is over and something has come; each byte stands for so many.
func (r role) gauge(c net.Conn, worth int) (g gauged, err error) {
	began := time.Now()
	for buf := make([]byte, 256<<10); time.Since(began) < r.Time; {
		n, err := c.Read(buf)
		if err != nil {
			return g, err
		}
		g.Done += n * worth
	}
	g.Bits = 8 * float64(g.Done) / time.Since(began).Seconds()
	return g, nil
}

// requestSize is small: one TLS record and one packet.
const requestSize = 200

// requests are asked one after the other on each of the connections, which stand before the first one.
func (r role) requests(config *tls.Config) (g gauged, err error) {
	var mu sync.Mutex
	var took []time.Duration
	conns := make([]*tls.Conn, r.Connections)
	for i := range conns {
		if conns[i], err = r.dial(config, askEcho); err != nil {
			return g, err
		}
		defer conns[i].Close()
		if err := exchange(conns[i], make([]byte, requestSize)); err != nil {
			return g, err
		}
	}
	began, next := time.Now(), atomic.Int32{}
	err = r.each(func() error {
		c, own := conns[next.Add(1)-1], []time.Duration(nil)
		for buf := make([]byte, requestSize); time.Since(began) < r.Time; {
			start := time.Now()
			if err := exchange(c, buf); err != nil {
				return err
			}
			own = append(own, time.Since(start))
		}
		mu.Lock()
		defer mu.Unlock()
		took = append(took, own...)
		return nil
	})
	slices.Sort(took)
	g = gauged{Done: len(took), PerSecond: float64(len(took)) / time.Since(began).Seconds()}
	if len(took) > 0 {
		g.P50, g.P99 = took[len(took)/2], took[len(took)*99/100]
	}
	return g, err
}

// idle opens connections and keeps them until its input ends: as many as each line says, in all.
func (r role) idle(config *tls.Config) error {
	var n int
	for conns := []*tls.Conn(nil); ; fmt.Println("open") {
		if _, err := fmt.Scan(&n); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		for len(conns) < n {
			c, err := r.dial(config, askEcho)
			if err == nil {
				err = exchange(c, []byte{1})
			}
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
	}
}
