package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// echo tells what a request was when it came to the service.
func echo(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s %s\nfrom %s\n", r.Method, r.Host, r.RequestURI, r.RemoteAddr)
	for name, values := range r.Header {
		fmt.Fprintf(w, "%s: %s\n", name, strings.Join(values, " | "))
	}
	body, err := io.ReadAll(r.Body)
	fmt.Fprintf(w, "\nbody %d %v\n", len(body), err)
}

func TestRequestsAreJudgedOneByOne(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			l := newWebLab(t, webConfig{http: "{}", handler: http.HandlerFunc(echo),
				access: `[{identities: ["spiffe://example.org/app/web"], routes: [{methods: [GET], paths: ["/public/*", "/caf%C3%A9"]}]}]`})
			c := l.client(webID, protocol)
			status, text := l.get(c, "/public/a%62c?secret=1")
			if status != 200 || !strings.HasPrefix(text, "GET "+l.addr+" /public/abc?secret=1\nfrom 127.0.0.1:") {
				t.Errorf("%d %s", status, text)
			}
			if status, text = l.get(c, "/admin"); status != 403 || !strings.Contains(text, "NOT_AUTHORISED") || strings.Contains(text, "public") {
				t.Errorf("%d %s", status, text)
			}
			if status, _ = l.get(c, "/caf%c3%a9"); status != 200 {
				t.Errorf("an escape in lower case: %d", status)
			}
			r := l.find(flow.EventRequest, flow.ReasonIdentity)
			if r.Request.Path != "/public/abc" || r.Request.Method != "GET" || r.Request.Status != 200 || r.Request.Host != "127.0.0.1" ||
				!strings.HasPrefix(r.Request.Rule, "access[0]") || r.Request.Number != 1 || r.Request.Took <= 0 || r.Application != protocol ||
				r.Identity != webID.String() || r.Proof != "spiffe" {
				t.Errorf("record %+v of %+v", r.Request, r)
			}
			no := l.find(flow.EventDeny, flow.ReasonNotAuthorised)
			if no.Request.Path != "/admin" || no.Request.Number != 2 || no.FlowID != r.FlowID || no.Verdict != flow.VerdictDenied {
				t.Errorf("denial %+v of %+v", no.Request, no)
			}
			c.CloseIdleConnections()
			end := l.find(flow.EventClose, flow.ReasonClosed)
			if open := l.find(flow.EventOpen, flow.ReasonIdentity); open.FlowID != r.FlowID || end.FlowID != r.FlowID || open.Application != protocol {
				t.Errorf("open %+v, close %+v", open, end)
			}
			if end.BytesToServer == 0 || end.BytesToClient == 0 {
				t.Errorf("bytes %d and %d", end.BytesToServer, end.BytesToClient)
			}
		})
	}
}

// TestConnectionsToTheServiceAreOneClients: nobody meets what another client left behind in a stream.
func TestConnectionsToTheServiceAreOneClients(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.RemoteAddr)
	})})
	one, other := l.client(webID, alpnHTTP1), l.client(webID, alpnHTTP1)
	_, first := l.get(one, "/")
	if _, again := l.get(one, "/"); again != first {
		t.Errorf("a client's second request came from %s, the first from %s", again, first)
	}
	if _, others := l.get(other, "/"); others == first {
		t.Errorf("two clients' requests came by the same connection from %s", first)
	}
}

func TestWebSocket(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: websocket.Server{Handler: func(c *websocket.Conn) { _, _ = io.Copy(c, c) }}})
	talk := func(c *websocket.Conn, word string) error {
		if _, err := io.WriteString(c, word); err != nil {
			return err
		}
		back := make([]byte, len(word))
		if _, err := io.ReadFull(c, back); err != nil {
			return err
		}
		if string(back) != word {
			return fmt.Errorf("heard %q", back)
		}
		return nil
	}
	config, err := websocket.NewConfig("wss://"+l.addr+"/chat", "https://"+l.addr)
	l.must(err)
	c, err := websocket.NewClient(config, l.dial(webID))
	l.must(err)
	l.must(talk(c, "hello"))
	l.must(talk(c, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")) // is nobody's request
	l.write("{}", `[{identities: ["spiffe://example.org/app/other"]}]`)
	if err := talk(c, "still there?"); err == nil {
		if _, err = c.Read(make([]byte, 1)); err == nil {
			t.Error("a WebSocket goes on that is not allowed any more")
		}
	}
	r := l.find(flow.EventRequest, flow.ReasonPolicyChanged)
	if r.Request.Status != 101 || r.Request.Path != "/chat" {
		t.Errorf("record %+v", r.Request)
	}
}

// grpcService answers streams of messages.
type grpcService struct {
	grpc_testing.UnimplementedTestServiceServer
}

func (grpcService) FullDuplexCall(s grpc_testing.TestService_FullDuplexCallServer) error {
	for {
		in, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return status.Error(codes.DataLoss, "told in a trailer")
		}
		if err != nil {
			return err
		}
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: in.Payload}); err != nil {
			return err
		}
	}
}

func (grpcService) EmptyCall(context.Context, *grpc_testing.Empty) (*grpc_testing.Empty, error) {
	return &grpc_testing.Empty{}, nil
}

func TestGRPC(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	grpc_testing.RegisterTestServiceServer(server, grpcService{})
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	l := newWebLab(t, webConfig{listener: listener, http: "{upstream: {h2c: true}}",
		access: `[{identities: ["spiffe://example.org/app/web"], routes: [{methods: [POST], paths: ["/grpc.testing.TestService/FullDuplexCall"]}]}]`})
	conn, err := grpc.NewClient(l.addr, grpc.WithTransportCredentials(credentials.NewTLS(l.tlsAs(webID))))
	l.must(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client := grpc_testing.NewTestServiceClient(conn)
	stream, err := client.FullDuplexCall(ctx)
	l.must(err)
	for i := range 3 { // each answer before the next question
		want := []byte{byte(i)}
		l.must(stream.Send(&grpc_testing.StreamingOutputCallRequest{Payload: &grpc_testing.Payload{Body: want}}))
		got, err := stream.Recv()
		l.must(err)
		if string(got.Payload.Body) != string(want) {
			t.Errorf("heard %v, want %v", got.Payload.Body, want)
		}
	}
	l.must(stream.CloseSend())
	if _, err := stream.Recv(); status.Code(err) != codes.DataLoss {
		t.Errorf("the trailer says %v", err)
	}
	if _, err := client.EmptyCall(ctx, &grpc_testing.Empty{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method that is not allowed: %v", err)
	}
	if r := l.find(flow.EventRequest, flow.ReasonIdentity); r.Request.Path != "/grpc.testing.TestService/FullDuplexCall" || r.Application != "h2" {
		t.Errorf("record %+v", r)
	}
}

// held is a service whose answers are under way until the test lets them end.
type held struct {
	began chan string // paths
	end   chan struct{}
}

func newHeld() *held { return &held{make(chan string, 10), make(chan struct{})} }

func (h *held) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fmt.Fprint(w, "begun ")
	w.(http.Flusher).Flush()
	select {
	case h.began <- r.URL.Path:
	case <-h.end: // nobody counts any more
	case <-r.Context().Done():
	}
	select {
	case <-h.end:
		fmt.Fprint(w, "ended")
	case <-r.Context().Done():
	}
}

// TestPolicyChangesUnderRequests: one that is still allowed goes on, one that is not ends, on one connection.
func TestPolicyChangesUnderRequests(t *testing.T) {
	t.Parallel()
	service := newHeld()
	rule := func(paths string) string {
		return fmt.Sprintf(`[{identities: ["spiffe://example.org/app/web"], routes: [{paths: [%s]}]}]`, paths)
	}
	l := newWebLab(t, webConfig{http: "{}", access: rule(`"/stays", "/goes"`), handler: service})
	c := l.client(webID, alpnHTTP2)
	ends := map[string]chan error{"/stays": make(chan error, 1), "/goes": make(chan error, 1)}
	for path, end := range ends {
		answer, err := c.Get("https://" + l.addr + path)
		l.must(err)
		go func() {
			text, err := io.ReadAll(answer.Body)
			if err == nil && string(text) != "begun ended" {
				err = fmt.Errorf("read %q", text)
			}
			end <- err
		}()
		<-service.began
	}
	l.write("{}", rule(`"/stays"`))
	if err := <-ends["/goes"]; err == nil {
		t.Error("a request ended well that is not allowed any more")
	}
	close(service.end)
	if err := <-ends["/stays"]; err != nil {
		t.Errorf("a request that is still allowed: %v", err)
	}
	if r := l.find(flow.EventRequest, flow.ReasonPolicyChanged); r.Request.Path != "/goes" {
		t.Errorf("record %+v", r.Request)
	}
	if r := l.find(flow.EventRequest, flow.ReasonIdentity); r.Request.Path != "/stays" {
		t.Errorf("record %+v", r.Request)
	}
}

// TestPolicyChangesUnderLoad: no request is dropped that each of the policies allows.
func TestPolicyChangesUnderLoad(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	var stop atomic.Bool
	var load sync.WaitGroup
	var sent atomic.Int64
	for i := range 4 {
		c := l.client(webID, []string{alpnHTTP1, alpnHTTP2}[i%2])
		load.Go(func() {
			for !stop.Load() {
				answer, err := c.Post("https://"+l.addr+"/", "text/plain", strings.NewReader("hello"))
				if err != nil {
					t.Errorf("a request is dropped: %v", err)
					return
				}
				_, err = io.Copy(io.Discard, answer.Body)
				answer.Body.Close()
				if err != nil || answer.StatusCode != 200 {
					t.Errorf("answer %d, %v", answer.StatusCode, err)
				}
				sent.Add(1)
			}
		})
	}
	for i := range 20 {
		seen := sent.Load()
		l.write("{}", fmt.Sprintf(`[{identities: ["spiffe://example.org/app/n%d"]}, {identities: ["spiffe://example.org/app/web"]}]`, i))
		for end := time.Now().Add(patience); sent.Load() < seen+8 && time.Now().Before(end) && !t.Failed(); {
			time.Sleep(time.Millisecond) // until the load has gone through that policy
		}
	}
	stop.Store(true)
	load.Wait()
}

// TestUpstreamTLS: a service that speaks TLS is believed by name and authority.
func TestUpstreamTLS(t *testing.T) {
	t.Parallel()
	service := httptest.NewUnstartedServer(http.HandlerFunc(echo))
	service.EnableHTTP2 = true
	service.StartTLS()
	defer service.Close()
	l := newWebLab(t, webConfig{listener: service.Listener, access: onlyWeb, http: upstreamTLS("example.com", service)})
	c := l.client(webID, alpnHTTP1)
	if status, text := l.get(c, "/x"); status != 200 || !strings.HasPrefix(text, "GET "+l.addr+" /x\n") {
		t.Errorf("%d %s", status, text)
	}
	l.write(upstreamTLS("other.example.org", service), onlyWeb)
	if status, text := l.get(l.client(webID, alpnHTTP1), "/x"); status != 502 || !strings.Contains(text, "UPSTREAM_FAILED") {
		t.Errorf("a service of another name: %d %s", status, text)
	}
	if r := l.find(flow.EventRequest, flow.ReasonUpstreamFailed); r.Request.Status != 502 || !strings.Contains(r.Detail, "other.example.org") {
		t.Errorf("record %+v", r)
	}
}

func upstreamTLS(name string, service *httptest.Server) string {
	pem := pemOf(service.Certificate().Raw)
	return fmt.Sprintf("{upstream: {tls: {serverName: %s, ca: %q}}}", name, pem)
}

// TestSSHIsRecognised: by what either side says first.
func TestSSHIsRecognised(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n")
			_, _ = bufio.NewReader(c).ReadString('\n')
			c.Close()
		}
	}()
	l := newWebLab(t, webConfig{listener: listener, access: onlyWeb})
	c := l.dial(webID)
	_, err = io.WriteString(c, "SSH-2.0-PuTTY\r\n")
	l.must(err)
	_, err = io.ReadAll(c)
	l.must(err)
	c.Close()
	if r := l.find(flow.EventClose, flow.ReasonClosed); r.Application != "ssh" {
		t.Errorf("record %+v", r)
	}
}

// TestTimeEndsLiveRequests: the end of a rule's hours, and of what a condition says of the time.
func TestTimeEndsLiveRequests(t *testing.T) {
	t.Parallel()
	soon := time.Now().UTC().Add(12 * time.Hour)
	for name, narrowed := range map[string]string{
		"hours":     fmt.Sprintf("during: [{from: \"%s\", to: \"%s\"}]", soon.Add(-13*time.Hour).Format("15:04"), soon.Format("15:04")),
		"condition": fmt.Sprintf("when: 'now < timestamp(\"%s\")'", soon.Format(time.RFC3339)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newWebLab(t, webConfig{http: "{}", handler: newHeld(), access: `[{identities: ["spiffe://example.org/app/web"], ` + narrowed + `}]`})
			answer, err := l.client(webID, alpnHTTP2).Get("https://" + l.addr)
			l.must(err)
			defer answer.Body.Close()
			l.ahead.Store(int64(12*time.Hour + time.Minute))
			if text, err := io.ReadAll(answer.Body); err == nil {
				t.Errorf("the answer ended well: %q", text)
			}
			l.find(flow.EventClose, flow.ReasonPolicyChanged)
		})
	}
}

// TestExpiryEndsLiveRequests: a connection lasts as long as the certificate that it was let in by.
func TestExpiryEndsLiveRequests(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		l := newWebLab(t, webConfig{http: "{}", handler: newHeld(), access: onlyWeb})
		answer, err := l.client(webID, protocol).Get("https://" + l.addr)
		l.must(err)
		l.ahead.Store(int64(identityTTL + time.Minute))
		if text, err := io.ReadAll(answer.Body); err == nil {
			t.Errorf("the answer ended well: %q", text)
		}
		answer.Body.Close()
		l.find(flow.EventClose, flow.ReasonIdentityExpired)
		if r := l.find(flow.EventRequest, flow.ReasonIdentityExpired); r.Request.Status != 200 {
			t.Errorf("record %+v", r.Request)
		}
	}
}

// TestTrustEndsLiveRequests: when the authority that a client was believed by is gone.
func TestTrustEndsLiveRequests(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", handler: newHeld(), access: onlyWeb})
	answer, err := l.client(webID, alpnHTTP2).Get("https://" + l.addr)
	l.must(err)
	defer answer.Body.Close()
	l.proxy.cfg.Identity.(own).withdraw()
	if text, err := io.ReadAll(answer.Body); err == nil {
		t.Errorf("the answer ended well: %q", text)
	}
	l.find(flow.EventClose, flow.ReasonPolicyChanged)
}

// TestNothingStays: of connections that ended in all ways, no goroutine, no connection to the service and no place is left.
func TestNothingStays(t *testing.T) { // not parallel: it counts
	l := newWebLab(t, webConfig{http: "{}", handler: http.HandlerFunc(echo), access: onlyWeb})
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} { // what is made once
		l.get(l.client(webID, protocol), "/")
	}
	l.settle()
	before := runtime.NumGoroutine()
	for i := range 40 {
		c := l.client(webID, []string{alpnHTTP1, alpnHTTP2}[i%2])
		l.get(c, "/")
		l.get(c, "/%2e")
		conn := l.dial(webID)
		_, err := io.WriteString(conn, []string{"GET / HT", getRoot + "garbage", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nx", ""}[i%4])
		l.must(err)
		l.must(conn.NetConn().Close())
		c.CloseIdleConnections()
	}
	l.settle()
	for end := time.Now().Add(patience); runtime.NumGoroutine() > before+5; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// settle waits until no client is connected.
func (l *webLab) settle() {
	l.Helper()
	for _, s := range l.proxy.room.snapshot() {
		if w := s.served(); w != nil {
			w.drain()
		}
	}
	for end := time.Now().Add(patience); len(l.proxy.room.snapshot()) > 0 || l.proxy.upstreams.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			l.Fatalf("%d sessions and %d connections to the service are left", len(l.proxy.room.snapshot()), l.proxy.upstreams.Load())
		}
	}
}

// TestDrainLetsRequestsEnd: a proxy that stops takes no more requests on a connection, and lets those under way end.
func TestDrainLetsRequestsEnd(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		service := newHeld()
		l := newWebLab(t, webConfig{http: "{}", handler: service, access: onlyWeb, change: func(c *Config) { c.DrainTimeout = patience }})
		answer, err := l.client(webID, protocol).Get("https://" + l.addr)
		l.must(err)
		drained := make(chan struct{})
		go func() { l.proxy.drain(t.Context()); close(drained) }()
		select {
		case <-drained:
			t.Errorf("%s: stopped before the answer ended", protocol)
		case <-time.After(100 * time.Millisecond): // a moment to do wrong
		}
		close(service.end)
		if text, err := io.ReadAll(answer.Body); err != nil || string(text) != "begun ended" {
			t.Errorf("%s: read %q, %v", protocol, text, err)
		}
		answer.Body.Close()
		<-drained
		l.find(flow.EventClose, flow.ReasonClosed)
	}
}
