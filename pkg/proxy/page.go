package proxy

import (
	"fmt"
	"net/http"
	"strconv"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// page is what a client gets that is refused. It says what the client can know or do; which rule it was is for the operators, who
// have the record.
func page(status int, reason flow.Reason, why string) string {
	return fmt.Sprintf("%s: %s\nhint: %s\n", reason, why, hintOf(reason, status))
}

func hintOf(reason flow.Reason, status int) string {
	switch reason {
	case flow.ReasonLoginNeeded:
		return "show a client certificate, or a token in the Authorization header, as the service takes it"
	case flow.ReasonTokenRefused, flow.ReasonSessionEnded:
		if status == http.StatusServiceUnavailable {
			return "wait a little and send the same token; if that goes on, tell who runs the service"
		}
		return "get a new token, or log in again"
	case flow.ReasonNotAuthorised, flow.ReasonPolicyChanged:
		return "ask who runs the service; `sallyport policy explain` tells them why"
	case flow.ReasonRequestLimit:
		if status == http.StatusTooManyRequests {
			return "send fewer requests, or wait a little"
		}
		return "send less, or faster"
	case flow.ReasonUpstreamFailed, flow.ReasonLoop:
		return "ask who runs the service: it is the service that does not answer"
	}
	return "mend the client; the request did not reach the service"
}

func statusLine(status int) string { return strconv.Itoa(status) + " " + http.StatusText(status) }
