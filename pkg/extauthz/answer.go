package extauthz

import (
	"context"
	"net/http"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sallyport-dev/sallyport/pkg/proxy"
)

// Check implements the Authorization service. A refusal is an answer, and not an error.
func (s *Server) Check(ctx context.Context, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	q := s.question(ctx, in)
	isHTTP := q.Request != nil
	a := s.cfg.Judge.Judge(ctx, q)
	out := &authv3.CheckResponse{DynamicMetadata: metadata(a)}
	if !a.Allowed {
		code := codes.PermissionDenied
		if a.Status == http.StatusUnauthorized {
			code = codes.Unauthenticated
		}
		out.Status = &rpcstatus.Status{Code: int32(code), Message: a.Reason.String() + ": " + a.Why}
		if isHTTP {
			out.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: denied(a)}
		}
		return out, nil
	}
	out.Status = &rpcstatus.Status{Code: int32(codes.OK)}
	if isHTTP {
		ok := &authv3.OkHttpResponse{Headers: overwrite(a.Set)}
		for _, name := range a.Remove {
			ok.HeadersToRemove = append(ok.HeadersToRemove, strings.ToLower(name))
		}
		out.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: ok}
	}
	return out, nil
}

func denied(a proxy.Answer) *authv3.DeniedHttpResponse {
	header := a.Header.Clone()
	if header == nil {
		header = http.Header{}
	}
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	return &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(a.Status)}, Headers: overwrite(header), Body: a.Text}
}

// overwrite is in the order of names. A client's field of the same name does not stay beside it.
func overwrite(h http.Header) (all []*corev3.HeaderValueOption) {
	for name, values := range h {
		all = append(all, &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: strings.ToLower(name), Value: strings.Join(values, joint(name))},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		})
	}
	slices.SortFunc(all, func(a, b *corev3.HeaderValueOption) int { return strings.Compare(a.Header.Key, b.Header.Key) })
	return all
}

// joint stands between the values of a field: cookies have one of their own.
func joint(name string) string {
	if name == "Cookie" {
		return "; "
	}
	return ", "
}

// metadata is for the other proxy's own log.
func metadata(a proxy.Answer) *structpb.Struct {
	fields := map[string]*structpb.Value{}
	for name, text := range map[string]string{"service": a.Service, "identity": a.Identity, "reason": a.Reason.String(), "grant": a.Grant} {
		if text != "" {
			fields[name] = structpb.NewStringValue(text)
		}
	}
	return &structpb.Struct{Fields: fields}
}
