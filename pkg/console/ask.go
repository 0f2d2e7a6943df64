package console

import (
	"errors"
	"io"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// problem is what the reader is told in the place of a page: what, where, what next.
type problem struct {
	code              int
	Title, What, Next string
}

func (p *problem) Error() string { return p.Title + ": " + p.What }

// wrongInput refuses what a form or an address says.
func wrongInput(what, next string) error {
	return &problem{http.StatusBadRequest, "That cannot be looked up", what, next}
}

// inWords puts an error of the collector in words.
func inWords(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	s := status.Convert(err)
	p := &problem{http.StatusBadGateway, "The collector could not answer", s.Message(), "Load the page again. If that does not help, look at the collector's own log."}
	switch s.Code() {
	case codes.PermissionDenied, codes.Unauthenticated:
		p.code, p.Title, p.Next = http.StatusForbidden, "The collector does not show this to you", "Whoever runs the collector lists its readers in its configuration (spec.readers), and who may act (spec.actors)."
	case codes.InvalidArgument, codes.OutOfRange:
		p.code, p.Title, p.Next = http.StatusBadRequest, "That cannot be looked up", "Mend what you asked for, and ask again."
	case codes.FailedPrecondition, codes.AlreadyExists, codes.Aborted, codes.ResourceExhausted:
		p.code, p.Title, p.Next = http.StatusConflict, "It was refused", "Read why, and try again if that has changed."
	case codes.NotFound:
		p.code, p.Title, p.Next = http.StatusNotFound, "It is not there", "What is older than the collector keeps is gone; else check what you asked for."
	case codes.Unavailable:
		p.Title, p.Next = "The collector does not answer", "Check that it runs: systemctl status sallyport-collector."
	case codes.DeadlineExceeded:
		p.code, p.Title, p.Next = http.StatusGatewayTimeout, "The collector took too long", "Ask for less: a shorter time, or one node."
	case codes.Unimplemented:
		p.code, p.Title, p.Next = http.StatusNotImplemented, "The collector does not know that", "It is of an older version: install this one there, too."
	}
	return p
}

func problemPage(err error) answer {
	p := inWords(err)
	return answer{name: "problem", title: p.Title, data: p, code: p.code}
}

// maxAnswer bounds what a page holds of the collector's answer to one query, in bytes.
const maxAnswer = 16 << 20

// collect reads the answer to a query with a limit. full says that there may be more.
func collect[M any](limit uint32, stream grpc.ServerStreamingClient[M], err error) (all []*M, full bool, _ error) {
	for size := 0; err == nil; {
		var m *M
		if m, err = stream.Recv(); err != nil {
			break
		}
		if p, ok := any(m).(proto.Message); ok {
			size += proto.Size(p)
		}
		if size > maxAnswer {
			return nil, false, &problem{http.StatusInsufficientStorage, "That is too much for a page", "The records that fit are too large to be shown together.", "Ask for less: a shorter time, one node, or a filter more."}
		}
		all = append(all, m)
	}
	if !errors.Is(err, io.EOF) {
		return nil, false, err
	}
	return all, len(all) >= int(limit), nil
}

// light leaves out the envelopes of events, by far their largest part, where many are read.
type light struct {
	grpc.ServerStreamingClient[api.StoredGrantEvent]
}

func (l light) Recv() (*api.StoredGrantEvent, error) {
	e, err := l.ServerStreamingClient.Recv()
	if e.GetEvent() != nil {
		e.Event.Envelope = nil
	}
	return e, err
}
