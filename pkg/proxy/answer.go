package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// answer is the answer to a request, and remembers what it was.
type answer struct {
	http.ResponseWriter
	status int        // 0: none yet
	fail   *rejection // why the service's answer is not what the client got
	cookie []string   // of ours, to be set by the last header of the answer
}

// hold keeps our cookies out of the header until the last one is sent: those of 103 and its like are the service's alone, and are
// taken out of the header again behind it, with all else that is there.
func (a *answer) hold() {
	a.cookie = a.Header()["Set-Cookie"]
	a.Header().Del("Set-Cookie")
}

func (a *answer) release() {
	for _, c := range a.cookie {
		a.Header().Add("Set-Cookie", c)
	}
	a.cookie = nil
}

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	if isLast := status >= 200 || status == http.StatusSwitchingProtocols; !isLast {
		login.StripAnswer(a.Header())
	} else if a.status == 0 {
		a.status = status
		a.release()
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (a *answer) Write(b []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	return a.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Hijack implements http.Hijacker, for what comes after 101.
func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	a.status = http.StatusSwitchingProtocols
	a.release()
	if guard, ok := conn.(*http1); ok {
		guard.open()
	}
	return conn, buffered, nil
}

// pacedBody is the body of a request, which must not come too slowly.
type pacedBody struct {
	io.ReadCloser
	deadline func(time.Time) error // of reads
	silence  time.Duration         // how long nothing may come; 0: for ever
	rate     uint64                // bytes a second, over each silence; 0: any

	began, armed time.Time // of the window, and of the deadline; used by the one reader
	got          uint64    // in the window
	late         atomic.Bool
}

// limitBody tells why the body is refused at once, or has it watched as it comes.
func (e *exchange) limitBody(limits policy.HTTPLimits, r *http.Request) *rejection {
	if r.ContentLength == 0 {
		return nil
	}
	if limit := int64(limits.BodyBytes); limit > 0 {
		if r.ContentLength > limit {
			return deny(http.StatusRequestEntityTooLarge, flow.ReasonRequestLimit, fmt.Sprintf("the body is larger than %d bytes", limit))
		}
		r.Body = http.MaxBytesReader(e.answer.ResponseWriter, r.Body, limit)
	}
	e.body = &pacedBody{
		ReadCloser: r.Body, deadline: http.NewResponseController(e.answer.ResponseWriter).SetReadDeadline,
		silence: limits.BodyTimeout.Duration, rate: uint64(limits.BodyRate), began: e.began,
	}
	if isGRPC(r) {
		e.body.silence = 0 // a stream of messages is as silent as its sender
	}
	r.Body = e.body
	return nil
}

func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
}

// Read implements io.Reader.
func (b *pacedBody) Read(p []byte) (int, error) {
	if b.silence == 0 {
		return b.ReadCloser.Read(p)
	}
	now := time.Now()
	if b.tooSlow(now) {
		b.late.Store(true)
		return 0, os.ErrDeadlineExceeded
	}
	if slack := b.silence / 8; now.Sub(b.armed) > slack { // setting it each time would cost more than reading
		b.armed = now
		_ = b.deadline(now.Add(b.silence + slack))
	}
	n, err := b.ReadCloser.Read(p)
	b.got += uint64(n)
	switch {
	case err == nil:
	case isTimeout(err):
		b.late.Store(true)
	default:
		_ = b.deadline(time.Time{}) // what comes next is no body
	}
	return n, err
}

// tooSlow looks at the end of each window.
func (b *pacedBody) tooSlow(now time.Time) bool {
	window := now.Sub(b.began)
	if window < b.silence {
		return false
	}
	slow := float64(b.got) < float64(b.rate)*window.Seconds()
	b.began, b.got = now, 0
	return slow
}
