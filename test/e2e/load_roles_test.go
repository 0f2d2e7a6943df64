package e2e_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// loadCommand makes the test binary a part of what is measured under attack: many bad clients, a good one, or a service that
// speaks HTTP, or a listener that is not Sallyport's. The argument is a loadRole in JSON. Clients end with their input, and then write
// a loadSaid.
const loadCommand = "slow-clients"

// loadRole is what such a process does.
type loadRole struct {
	Do      string         // an attack, "good", "web" or "bare"
	At      netip.AddrPort // what it connects to, or where it listens
	PEM     []string       // folders with svid.pem and bundle.pem; connections take turns
	To      netip.AddrPort // of bare: where bytes go that are no HTTP
	N       int            // connections at a time
	Sources int            // addresses that it comes from; 0: its own
	Pause   time.Duration  // of an attacker, between its connections; of bare: its patience
}

// loadSaid is what became of it.
type loadSaid struct {
	Connected int64 // TCP connections that were accepted
	Proven    int64 // of these: TLS handshakes that were completed, as the client sees it
	New, Live taken // of a good client: a connection with a request; a request on a connection that stands
}

// taken is how long things took.
type taken struct {
	Failed int
	Took   []time.Duration
}

// at is a percentile of it, or 0 where nothing was done.
func (t taken) at(percent int) time.Duration {
	if len(t.Took) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(t.Took))[len(t.Took)*percent/100]
}

// together is what several took.
func together(all []taken) (sum taken) {
	for _, t := range all {
		sum.Failed += t.Failed
		sum.Took = append(sum.Took, t.Took...)
	}
	return sum
}

func runLoad(text string) int {
	var r loadRole
	err := json.Unmarshal([]byte(text), &r)
	if err == nil {
		err = r.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "slow-clients:", err)
		return 1
	}
	return 0
}

func (r loadRole) text() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // of strings and numbers
	}
	return string(text)
}

func (r loadRole) run() error {
	switch r.Do {
	case "web":
		return r.serveWeb()
	case "bare":
		return r.serveBare()
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	configs := make([]*tls.Config, len(r.PEM))
	for i, dir := range r.PEM {
		var err error
		if configs[i], err = (role{PEM: dir}).client(); err != nil {
			return err
		}
	}
	clients := r.attack
	if r.Do == "good" {
		clients = r.good
	}
	said, err := clients(ctx, configs)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(said)
}

// serveWeb reads all of each request, and answers.
func (r loadRole) serveWeb() error {
	return http.ListenAndServe(r.At.String(), http.HandlerFunc(answerWeb))
}

func answerWeb(w http.ResponseWriter, q *http.Request) {
	_, _ = io.Copy(io.Discard, q.Body)
	fmt.Fprintln(w, "here")
}

// attacker is one of many: it has one connection at a time, and another one when that has ended.
type attacker struct {
	to     netip.AddrPort
	from   netip.AddrPort // invalid: the kernel chooses
	config *tls.Config
	pause  time.Duration
	hold   func(context.Context, net.Conn, *attacker) // until the connection ends

	stood            *sync.Once // with the first connection
	standing         *sync.WaitGroup
	connected, prove *atomic.Int64
}

// attack says "ready" when everybody has been where the attack wants to be.
func (r loadRole) attack(ctx context.Context, configs []*tls.Config) (loadSaid, error) {
	hello, err := clientHello(configs[0])
	if err != nil {
		return loadSaid{}, err
	}
	hold, ok := map[string]func(context.Context, net.Conn, *attacker){
		"silent": holdSilent, "drip": dripper(hello), "header": holdHeader, "body": holdBody, "h2": holdIdle, "flood": handshakeOnce,
	}[r.Do]
	if !ok {
		return loadSaid{}, fmt.Errorf("no attack is named %q", r.Do)
	}
	var connected, prove atomic.Int64
	var standing, running sync.WaitGroup
	standing.Add(r.N)
	for i := range r.N {
		a := &attacker{to: r.At, pause: r.Pause, config: configs[i%len(configs)], hold: hold, stood: &sync.Once{}, standing: &standing, connected: &connected, prove: &prove}
		if r.Sources > 0 {
			a.from = memberAt(i % r.Sources)
		}
		running.Go(func() { a.run(ctx) })
	}
	standing.Wait()
	fmt.Println("ready")
	running.Wait()
	return loadSaid{Connected: connected.Load(), Proven: prove.Load()}, nil
}

func (a *attacker) stands() { a.stood.Do(a.standing.Done) }

func (a *attacker) run(ctx context.Context) {
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	if a.from.IsValid() {
		d.LocalAddr, d.Control = net.TCPAddrFromAddrPort(a.from), transparent // the port is chosen at connect
	}
	for ctx.Err() == nil {
		c, err := d.Dial("tcp4", a.to.String()) // to its end: each connection counts
		if err == nil || errors.Is(err, unix.ECONNRESET) {
			a.connected.Add(1) // it was reset before we have seen that it was there
		}
		if err != nil {
			a.stands()
			time.Sleep(20 * time.Millisecond) // of an attacker, who would otherwise attack itself
			continue
		}
		stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
		a.hold(ctx, c, a)
		stop()
		a.stands()
		_ = c.(*net.TCPConn).SetLinger(0) // or the ports are used up
		_ = c.Close()
		time.Sleep(a.pause) // by which the attack is made
	}
	a.stands()
}

func holdSilent(_ context.Context, c net.Conn, a *attacker) {
	a.stands()
	_, _ = io.Copy(io.Discard, c)
}

// dripEvery is how often a byte comes.
const dripEvery = time.Second

// drip sends bytes until the connection ends, or all of them are sent. What comes is read.
func drip(ctx context.Context, c net.Conn, text []byte) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, c)
	}()
	tick := time.NewTicker(dripEvery)
	defer tick.Stop()
	for i := 0; ; i++ {
		if i < len(text) {
			_, _ = c.Write(text[i : i+1])
		}
		select {
		case <-tick.C:
		case <-ended:
			return
		case <-ctx.Done():
			_ = c.Close()
			<-ended
			return
		}
	}
}

func dripper(hello []byte) func(context.Context, net.Conn, *attacker) {
	return func(ctx context.Context, c net.Conn, a *attacker) {
		a.stands()
		drip(ctx, c, hello)
	}
}

// clientHello is the first message of a handshake.
func clientHello(config *tls.Config) ([]byte, error) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() {
		_ = tls.Client(theirs, config).Handshake()
		theirs.Close()
	}()
	buf := make([]byte, 16<<10)
	n, err := ours.Read(buf)
	return buf[:n], err
}

// proven speaks TLS with a certificate, and one of the protocols.
func (a *attacker) proven(ctx context.Context, c net.Conn, protocols ...string) *tls.Conn {
	config := a.config.Clone()
	config.NextProtos = protocols
	secured := tls.Client(c, config)
	if secured.HandshakeContext(ctx) != nil {
		return nil
	}
	a.prove.Add(1)
	return secured
}

func holdHeader(ctx context.Context, c net.Conn, a *attacker) {
	if secured := a.proven(ctx, c, "http/1.1"); secured != nil {
		a.stands()
		drip(ctx, secured, []byte("GET / HTTP/1.1\r\nHost: shop\r\nX-Slow: slow\r\n\r\n"))
	}
}

func holdBody(ctx context.Context, c net.Conn, a *attacker) {
	if secured := a.proven(ctx, c, "http/1.1"); secured != nil {
		_, _ = io.WriteString(secured, "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 1000000\r\n\r\n")
		a.stands()
		drip(ctx, secured, make([]byte, 1000))
	}
}

// holdIdle opens HTTP/2 and asks for nothing.
func holdIdle(ctx context.Context, c net.Conn, a *attacker) {
	secured := a.proven(ctx, c, "h2")
	if secured == nil {
		return
	}
	_, _ = io.WriteString(secured, http2.ClientPreface)
	_ = http2.NewFramer(secured, secured).WriteSettings()
	a.stands()
	_, _ = io.Copy(io.Discard, secured)
}

// handshakeOnce waits to be refused, or for an answer.
func handshakeOnce(ctx context.Context, c net.Conn, a *attacker) {
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if secured := a.proven(ctx, c); secured != nil {
		_ = exchange(secured, []byte{askEcho}) // comes back
	}
}

// Pace of a good client: it is not the load.
const (
	goodNew  = 25 * time.Millisecond
	goodLive = 5 * time.Millisecond
)

// good says "ready" when its standing connection stands, and goes on until ctx ends.
func (r loadRole) good(ctx context.Context, configs []*tls.Config) (said loadSaid, err error) {
	live, config := role{At: r.At}, configs[0]
	standing, err := live.dial(config, askEcho)
	if err != nil {
		return said, err
	}
	defer standing.Close()
	if err := exchange(standing, make([]byte, requestSize)); err != nil {
		return said, err
	}
	defer context.AfterFunc(ctx, func() { _ = standing.SetDeadline(time.Now().Add(10 * time.Second)) })()
	fmt.Println("ready")
	var both sync.WaitGroup
	both.Go(func() {
		said.New = pace(ctx, goodNew, func() error {
			c, err := live.dial(config, askEcho)
			if err != nil {
				return err
			}
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			return errors.Join(exchange(c, make([]byte, requestSize)), c.Close())
		})
	})
	both.Go(func() {
		said.Live = pace(ctx, goodLive, func() error { return exchange(standing, make([]byte, requestSize)) })
	})
	both.Wait()
	return said, nil
}

// pace does something at each tick, or at the next one when it takes longer.
func pace(ctx context.Context, every time.Duration, f func() error) (t taken) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return t
		}
		began := time.Now()
		if f() != nil {
			t.Failed++
			continue
		}
		t.Took = append(t.Took, time.Since(began))
	}
}
