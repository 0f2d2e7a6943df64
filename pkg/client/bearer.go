package client

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TurnedAway is the proxy's answer to a token that does not let us in.
type TurnedAway struct {
	// Status is HTTP's: 401 no token that counts, 403 not allowed, 502 and 503 not now.
	Status int
	// Reason is that of the proxy's record, and Flow the connection there; both may be empty, and are not yet safe for a terminal.
	Reason, Flow string
}

// Error says it in the proxy's words.
func (e *TurnedAway) Error() string {
	text := fmt.Sprintf("the proxy answered %d %s", e.Status, http.StatusText(e.Status))
	if e.Reason != "" {
		text += ", " + e.Reason
	}
	if e.Flow != "" {
		text += " (flow " + e.Flow + ")"
	}
	return text
}

// Is says that it is a refusal, or that there is no answer of the service for now.
func (e *TurnedAway) Is(target error) bool {
	if e.Status >= http.StatusInternalServerError {
		return target == ErrUnreachable
	}
	return target == ErrRefused
}

// maxAnswer bounds the header of the proxy's answer.
const maxAnswer = 16 << 10

// show shows a token, and waits for the answer. What comes behind that is left to be read.
func show(ctx context.Context, remote *secured, server, token string) error {
	if end, ok := ctx.Deadline(); ok {
		if err := remote.SetDeadline(end); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = remote.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return fmt.Errorf("show token: it has characters that no token has")
	}
	if _, err := fmt.Fprintf(remote, "CONNECT %[1]s HTTP/1.1\r\nHost: %[1]s\r\nAuthorization: Bearer %[2]s\r\n\r\n", server, token); err != nil {
		return fmt.Errorf("show token: %w", err)
	}
	header, err := readHeader(remote)
	if err != nil {
		return fmt.Errorf("show token: %w", err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(header), remote)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return fmt.Errorf("read the proxy's answer to the token: %w", err)
	}
	if answer.StatusCode != http.StatusOK {
		return turnedAway(answer)
	}
	if !stop() {
		return context.Cause(ctx)
	}
	return remote.SetDeadline(time.Time{})
}

// readHeader takes no byte beyond the header: what follows is the service's.
func readHeader(r io.Reader) (header []byte, err error) {
	one := make([]byte, 1)
	for !bytes.HasSuffix(header, []byte("\r\n\r\n")) {
		if len(header) == maxAnswer {
			return nil, fmt.Errorf("the proxy's answer is larger than %d bytes", maxAnswer)
		}
		if _, err := io.ReadFull(r, one); err != nil {
			return nil, err
		}
		header = append(header, one[0])
	}
	return header, nil
}

func turnedAway(answer *http.Response) error {
	e := &TurnedAway{Status: answer.StatusCode, Reason: answer.Header.Get(api.ReasonHeader), Flow: answer.Header.Get(api.FlowHeader)}
	answer.Body.Close()
	return e
}
