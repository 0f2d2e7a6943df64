package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// http1 stands between an HTTP/1.1 client and net/http, and lets through what has one reading only. net/http is lenient where
// others are too, each in a way of its own: it takes a length beside chunks, folded lines and bare line feeds. What it makes of
// them is sound, and is what the service gets; but whoever sends such things is after a reader who is less careful.
type http1 struct {
	*client
	limit   int           // of a header, in bytes
	timeout time.Duration // of a header, from its first byte
	refuse  func(badRequest)
	linger  func() // lets the client take in an answer before the connection is closed

	mu     sync.Mutex
	asked  time.Time // guarded by mu; the deadline that net/http set
	headBy time.Time // guarded by mu; when the header under way must be complete
	owed   int       // guarded by mu; requests whose header went on, and that are not answered
	served bool      // guarded by mu; one of them is with our handler

	// owned by the one reader
	base    []byte // what in is a part of
	in      []byte // received
	clear   int    // so many bytes of in may go on
	part    part
	left    int64 // bytes of the body or chunk under way
	chunked bool
}

// part of a message that comes next.
type part int

const (
	partHead      part = iota // request line and fields
	partBody                  // of a known length
	partChunkSize             // a line with the size of a chunk
	partChunkEnd              // the line end behind it
	partTrailer               // fields behind the last chunk
	partOpen                  // another protocol, which is not looked at
)

// badRequest is why a request is not taken, and what the client gets.
type badRequest struct {
	status int
	reason flow.Reason
	why    string
}

// Error implements error.
func (b badRequest) Error() string { return b.why }

func malformed(format string, args ...any) error {
	return badRequest{400, flow.ReasonBadRequest, fmt.Sprintf(format, args...)}
}

// firstRead is how much is asked of a connection that may long be silent.
const firstRead = 2 << 10

// maxLine bounds a line that says how long a chunk is, and its extensions.
const maxLine = 256

// Read implements net.Conn. After a request that is refused it gives io.EOF.
func (c *http1) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for c.clear == 0 {
		if len(c.in) == 0 && (c.part == partOpen || c.part == partBody) {
			return c.readThrough(b)
		}
		more, err := c.step()
		if err == nil && more {
			err = c.fill()
		}
		var bad badRequest
		if errors.As(err, &bad) {
			c.answer(bad)
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
	}
	n := copy(b, c.in[:c.clear])
	c.in, c.clear = c.in[n:], c.clear-n
	return n, nil
}

// readThrough reads what needs no look.
func (c *http1) readThrough(b []byte) (int, error) {
	if c.part == partOpen {
		return c.client.Read(b)
	}
	n, err := c.client.Read(b[:min(int64(len(b)), c.left)])
	c.left -= int64(n)
	if c.left == 0 {
		c.endBody()
	}
	return n, err
}

// fill waits for bytes of the client.
func (c *http1) fill() error {
	if len(c.in) > 0 && c.part == partHead {
		c.startHead()
	}
	if len(c.in) == 0 {
		c.in = c.base[:0]
	}
	if cap(c.in)-len(c.in) < firstRead {
		c.in = slices.Grow(c.in, firstRead)
		c.base = c.in
	}
	n, err := c.client.Read(c.in[len(c.in) : len(c.in)+firstRead])
	c.in = c.in[:len(c.in)+n]
	if n > 0 {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && c.isLate(time.Now()) {
		return badRequest{408, flow.ReasonRequestLimit, fmt.Sprintf("header took longer than %s", c.timeout)}
	}
	return err
}

// step clears what has been received of the part that is under way. more says that it needs more bytes.
func (c *http1) step() (more bool, err error) {
	switch c.part {
	case partHead:
		return c.stepHead()
	case partBody:
		c.clear = int(min(int64(len(c.in)), c.left))
		if c.left -= int64(c.clear); c.left == 0 {
			c.endBody()
		}
	case partChunkSize, partChunkEnd, partTrailer:
		return c.stepLine()
	case partOpen:
		c.clear = len(c.in)
	}
	return c.clear == 0 && len(c.in) == 0, nil
}

// endBody tells what follows a body, or a chunk, of which nothing is left.
func (c *http1) endBody() {
	if c.chunked {
		c.part = partChunkEnd
		return
	}
	c.part = partHead
}

func (c *http1) stepHead() (more bool, err error) {
	end := bytes.Index(c.in, []byte("\r\n\r\n"))
	switch {
	case end < 0 && len(c.in) > c.limit, end > c.limit:
		return false, badRequest{431, flow.ReasonRequestLimit, fmt.Sprintf("header is longer than %d bytes", c.limit)}
	case end < 0:
		return true, hasBareLineEnd(c.in)
	}
	f, err := readHead(string(c.in[:end]))
	if err != nil {
		return false, err
	}
	c.endHead()
	c.clear = end + len("\r\n\r\n")
	c.chunked, c.left = f.chunked, f.length
	switch {
	case f.chunked:
		c.part = partChunkSize
	case f.length > 0:
		c.part = partBody
	}
	return false, nil
}

// stepLine clears a line of the framing of chunks.
func (c *http1) stepLine() (more bool, err error) {
	end := bytes.Index(c.in, []byte("\r\n"))
	if end < 0 {
		if len(c.in) > maxLine {
			return false, malformed("a line between chunks is longer than %d bytes", maxLine)
		}
		return true, hasBareLineEnd(c.in)
	}
	line := string(c.in[:end])
	if err := hasBareLineEnd(c.in[:end]); err != nil {
		return false, err
	}
	c.clear = end + len("\r\n")
	switch c.part {
	case partChunkEnd:
		if c.part = partChunkSize; line != "" {
			return false, malformed("a chunk is longer than it says")
		}
	case partTrailer:
		if line == "" {
			c.part, c.chunked = partHead, false
			return false, nil
		}
		if err := checkField(line); err != nil {
			return false, err
		}
		return false, malformed("the request has a trailer that it did not announce")
	default:
		return false, c.startChunk(line)
	}
	return false, nil
}

func (c *http1) startChunk(line string) error {
	digits, _, _ := strings.Cut(line, ";")
	size, err := strconv.ParseUint(digits, 16, 62)
	if err != nil || strings.HasPrefix(digits, "+") {
		return malformed("the size of a chunk is %q", digits)
	}
	c.part, c.left = partBody, int64(size)
	if size == 0 {
		c.part = partTrailer
	}
	return nil
}

// hasBareLineEnd refuses line ends that are not both bytes: readers differ in what they are. The last byte may go on.
func hasBareLineEnd(b []byte) error {
	for i, v := range b {
		if v == '\n' && (i == 0 || b[i-1] != '\r') || i > 0 && b[i-1] == '\r' && v != '\n' {
			return malformed("a line does not end in CR LF")
		}
	}
	return nil
}

// framing is how long the body of a request is.
type framing struct {
	chunked bool
	length  int64
}

// readHead checks the header of a request, without the empty line at its end.
func readHead(head string) (framing, error) {
	if err := hasBareLineEnd([]byte(head)); err != nil {
		return framing{}, err
	}
	lines := strings.Split(head, "\r\n")
	if err := checkRequestLine(lines[0]); err != nil {
		return framing{}, err
	}
	fields := map[string][]string{} // those that say where a request goes and ends
	for _, line := range lines[1:] {
		if err := checkField(line); err != nil {
			return framing{}, err
		}
		name, value, _ := strings.Cut(line, ":")
		switch name = strings.ToLower(name); name {
		case "host", "content-length", "transfer-encoding":
			fields[name] = append(fields[name], strings.Trim(value, " \t"))
		}
	}
	if n := len(fields["host"]); n != 1 {
		return framing{}, malformed("the request has %d Host fields, not one", n)
	}
	return readFraming(fields["content-length"], fields["transfer-encoding"])
}

func readFraming(lengths, encodings []string) (framing, error) {
	switch {
	case len(encodings) > 0 && len(lengths) > 0:
		return framing{}, malformed("the request has both Content-Length and Transfer-Encoding")
	case len(encodings) > 1, len(encodings) == 1 && !strings.EqualFold(encodings[0], "chunked"):
		return framing{}, malformed("the transfer encoding is %q, not chunked alone", strings.Join(encodings, ", "))
	case len(encodings) == 1:
		return framing{chunked: true}, nil
	case len(lengths) > 1:
		return framing{}, malformed("the request has %d Content-Length fields", len(lengths))
	case len(lengths) == 0:
		return framing{}, nil
	}
	n, err := strconv.ParseUint(lengths[0], 10, 62)
	if err != nil || lengths[0][0] == '+' {
		return framing{}, malformed("the content length is %q", lengths[0])
	}
	return framing{length: int64(n)}, nil
}

func checkRequestLine(line string) error {
	words := strings.Split(line, " ")
	if len(words) != 3 || !httpguts.ValidHeaderFieldName(words[0]) {
		return malformed("the request line is not METHOD PATH HTTP/1.1")
	}
	switch version := words[2]; {
	case version == "HTTP/1.0":
		return badRequest{505, flow.ReasonBadRequest, "HTTP/1.0 has no sure end of an answer: use HTTP/1.1"}
	case version != "HTTP/1.1":
		return malformed("the request line is not METHOD PATH HTTP/1.1")
	}
	return nil
}

func checkField(line string) error {
	name, value, ok := strings.Cut(line, ":")
	switch {
	case line == "" || line[0] == ' ' || line[0] == '\t':
		return malformed("a header field is folded over lines")
	case !ok || !httpguts.ValidHeaderFieldName(name):
		return malformed("%q is not the name of a header field", name)
	case !httpguts.ValidHeaderFieldValue(value):
		return malformed("the value of %s has control characters", name)
	}
	return nil
}

// startHead starts the time that a header has, at its first byte.
func (c *http1) startHead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.headBy.IsZero() {
		c.headBy = time.Now().Add(c.timeout)
		_ = c.setDeadline()
	}
}

func (c *http1) endHead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.owed++
	if !c.headBy.IsZero() {
		c.headBy = time.Time{}
		_ = c.setDeadline()
	}
}

func (c *http1) isLate(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.headBy.IsZero() && !now.Before(c.headBy)
}

// SetReadDeadline implements net.Conn. net/http uses it to end a read from another goroutine, so the header's time may
// not overwrite it.
func (c *http1) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = t
	return c.setDeadline()
}

// setDeadline takes the earlier one. c.mu is held.
func (c *http1) setDeadline() error {
	at := c.asked
	if !c.headBy.IsZero() && (at.IsZero() || c.headBy.Before(at)) {
		at = c.headBy
	}
	return c.client.SetReadDeadline(at)
}

// SetDeadline implements net.Conn.
func (c *http1) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// answered says that the answer to a request has been sent. The header of the next one may have gone on before that.
func (c *http1) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.owed--
	c.served = false
}

// serves says that our handler has a request.
func (c *http1) serves() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.served = true
}

// Write implements net.Conn. What net/http answers before our handler has the request is a refusal of its own, and is recorded here.
func (c *http1) Write(b []byte) (int, error) {
	c.mu.Lock()
	served := c.served
	c.served = true // it is recorded once
	c.mu.Unlock()
	if !served {
		line, _, _ := strings.Cut(string(b[:min(len(b), maxLine)]), "\r\n")
		c.refuse(badRequest{reason: flow.ReasonBadRequest, why: "net/http answers " + line})
	}
	return c.client.Write(b)
}

// open lets everything through from now on. Nobody may be reading.
func (c *http1) open() {
	c.endHead()
	c.part = partOpen
}

// answer tells the client what was wrong, unless that would end up in the midst of another answer.
func (c *http1) answer(bad badRequest) {
	c.refuse(bad)
	c.mu.Lock()
	owed := c.owed
	c.mu.Unlock()
	if owed > 0 {
		return
	}
	_ = c.SetWriteDeadline(time.Now().Add(lingerTime))
	text := page(bad.status, bad.reason, bad.why)
	fmt.Fprintf(c.client, "HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		statusLine(bad.status), len(text), text)
	_ = c.CloseWrite()
	c.linger()
}
