package client

import (
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What callers may match with errors.Is. Errors of the operating system below a failed dial
// (fs.ErrNotExist, fs.ErrPermission) can be matched as well.
var (
	// ErrUnreachable says that the other side gave no answer.
	ErrUnreachable = errors.New("no answer")
	// ErrNotReached says, beside ErrUnreachable, that no connection came about and nobody refused one: there is no way to
	// that address from here, or nobody has it.
	ErrNotReached = errors.New("not reached")
	// ErrForbidden says that the other side does not serve this caller.
	ErrForbidden = errors.New("caller is not allowed")
	// ErrRefused says that the other side understood the request and said no.
	ErrRefused = errors.New("refused")
	// ErrNotFound says that what was asked for does not exist.
	ErrNotFound = errors.New("not found")
	// ErrUntrusted says that what answered did not prove an identity that we expect there.
	ErrUntrusted = errors.New("other identity than expected")
	// ErrNoTokens says that what answered takes no token before the first byte.
	ErrNoTokens = errors.New("no token is taken there")
	// ErrUnknownCall says that the other side is of a version that does not have the call.
	ErrUnknownCall = errors.New("call is not known there")
)

// CallError is a call that the other side did not do.
type CallError struct {
	// Op is what was asked: "activate grant".
	Op string
	// Address is who was asked: host:port or unix:PATH.
	Address string
	// Kind wraps one of the sentinels of this package or two, or is nil.
	Kind error
	// Message is the other side's own words, one problem per line; not yet safe for a terminal.
	Message string

	cause error
}

// Error gives the operation and the other side's words.
func (e *CallError) Error() string {
	if errors.Is(e.Kind, ErrUnreachable) {
		return fmt.Sprintf("%s: no answer from %s: %s", e.Op, e.Address, e.Message)
	}
	return e.Op + ": " + e.Message
}

// Unwrap gives the kind and the operating system's error, where there are any.
func (e *CallError) Unwrap() []error {
	var errs []error
	for _, err := range []error{e.Kind, e.cause} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

func (c *connection) translate(op string, err error) error {
	s := status.Convert(err)
	e := &CallError{Op: op, Address: c.address, Kind: kind(s.Code()), Message: s.Message()}
	if errors.Is(e.Kind, ErrUnreachable) && !c.isReached() {
		e.Kind = errors.Join(ErrUnreachable, ErrNotReached)
	}
	if s.Code() != codes.Unavailable {
		return e
	}
	if cause := c.dialError(); cause != nil {
		e.cause, e.Message = cause, reason(cause)
	}
	return e
}

// reason is a dial's error without the address, which the call's error gives already.
func reason(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err.Error()
	}
	return err.Error()
}

func kind(code codes.Code) error {
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return ErrUnreachable
	case codes.PermissionDenied, codes.Unauthenticated:
		return ErrForbidden
	case codes.InvalidArgument, codes.FailedPrecondition, codes.AlreadyExists, codes.ResourceExhausted, codes.Aborted, codes.OutOfRange:
		return ErrRefused
	case codes.NotFound:
		return ErrNotFound
	case codes.Unimplemented:
		return ErrUnknownCall
	}
	return nil
}
