package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// exchange is one request and its answer.
type exchange struct {
	w       *web
	number  uint64 // on its connection
	began   time.Time
	method  string
	target  target
	via     []string
	request policy.Request // as it is judged
	caller  policy.Caller
	token   string         // that proved the caller; "" if none did
	login   *login.Session // that did; nil: none
	expires time.Time      // of token or login; zero: never
	rule    string         // that lets it through
	answer  *answer
	ctx     context.Context // ends with the request; its cause may be an *ending
	cancel  context.CancelCauseFunc
	doubt   doubt      // of token
	body    *pacedBody // nil: none
	whole   bool       // the answer did not break off
}

// rejection is why a request is refused, and with what.
type rejection struct {
	badRequest
	header   http.Header // of the answer
	detail   string      // for the record alone; "" for why
	answered bool        // the client has its answer
}

func deny(status int, reason flow.Reason, why string) *rejection {
	return &rejection{badRequest: badRequest{status, reason, why}}
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange { return ctx.Value(exchangeKey{}).(*exchange) }

// ServeHTTP implements http.Handler: it judges a request and carries it.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w.handlers.Add(1)
	defer w.handlers.Done()
	if w.guard != nil {
		w.guard.serves()
	}
	e := &exchange{w: w, number: w.requests.Add(1), began: time.Now(), method: oneLine(r.Method), answer: &answer{ResponseWriter: rw}}
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), exchangeKey{}, e))
	defer cancel(nil)
	e.ctx, e.cancel = ctx, cancel
	r = r.WithContext(ctx)
	set := w.s.p.cfg.Policy.Set()
	if d := e.admit(set, r); d != nil {
		e.refuse(d)
		return
	}
	w.enter(e)
	defer w.leave(e)
	if w.s.p.cfg.Policy.Set() != set { // changed before it was live
		if end := e.objection(); end != nil {
			e.cut(end)
		}
	}
	defer e.report()
	defer e.countReset()
	w.reverse.ServeHTTP(e.answer, r) // panics when the answer breaks off
	e.whole = true
}

// admit tells why the request is refused, or gives nil.
func (e *exchange) admit(set *policy.Set, r *http.Request) *rejection {
	service, ok := set.Service(e.w.s.identity().service)
	if !ok || service.Spec.HTTP == nil {
		return deny(http.StatusForbidden, flow.ReasonPolicyChanged, "the service is not served as HTTP any more")
	}
	if d := e.read(service.Spec.HTTP, r); d != nil {
		return d
	}
	if d := e.identify(service, r); d != nil {
		return d
	}
	limits := service.Spec.HTTP.Limits
	if !e.w.s.p.pace.allow(service.Name, e.caller.String(), limits.RequestsPerMinute, e.began) {
		return tooMany(limits)
	}
	e.request = policy.Request{Method: r.Method, Host: e.target.host, Path: e.target.path, Headers: ruleHeaders(r.Header)}
	decision := set.Authorise(service.Name, e.caller, &e.request, e.w.s.p.now())
	if !decision.Allowed {
		return notAllowed(decision)
	}
	e.rule = decision.Rule
	e.answer.hold()
	e.w.noteOpen(e.caller)
	return e.limitBody(limits, r)
}

func tooMany(limits policy.HTTPLimits) *rejection {
	d := deny(http.StatusTooManyRequests, flow.ReasonRequestLimit, fmt.Sprintf("more than %d requests a minute", limits.RequestsPerMinute))
	d.header = http.Header{"Retry-After": {"60"}}
	return d
}

func notAllowed(decision policy.Decision) *rejection {
	d := deny(http.StatusForbidden, flow.ReasonNotAuthorised, "this is not allowed to you")
	d.detail = strings.Join(decision.Near, "; ")
	return d
}

// read takes in what is asked for.
func (e *exchange) read(spec *policy.HTTPSpec, r *http.Request) (d *rejection) {
	e.target, e.via, d = readRequest(r, spec.Hosts, e.w.mark())
	return d
}

// readRequest also gives the passages through proxies that the request tells of. mark is that of the one it is about to make.
func readRequest(r *http.Request, hosts []string, mark string) (target, []string, *rejection) {
	t, err := readTarget(r, hosts)
	if err == nil {
		err = checkHeaders(r)
	}
	if err != nil {
		d := &rejection{}
		errors.As(err, &d.badRequest)
		return t, nil, d
	}
	passed := via(r.Header)
	if slices.Contains(passed, mark) || len(passed) >= maxPassages {
		return t, nil, deny(http.StatusLoopDetected, flow.ReasonLoop, "the request has been here before")
	}
	return t, passed, nil
}

// maxPassages is how many proxies a request may come through.
const maxPassages = 16

// mark tells a passage through this proxy to this service from others. Who makes one up is refused as a loop.
func (w *web) mark() string { return w.s.p.instance + "/" + w.s.identity().service }

// identify finds out who asks: by the certificate of the connection, else by a token, else by a login. What proved the caller to us
// is nobody else's, and is taken out of the request.
func (e *exchange) identify(service policy.ProtectedService, r *http.Request) *rejection {
	defer login.Strip(r.Header)
	spec := service.Spec.HTTP
	if who := e.w.s.identity(); len(who.chain) > 0 && takes(*spec, policy.AuthenticateSPIFFE) {
		e.caller = who.caller
		return nil
	}
	bearer, shown := bearerToken(r.Header)
	if shown && takesTokens(*spec) && e.w.s.p.cfg.Tokens != nil {
		return e.identifyByToken(service, r, bearer)
	}
	if spec.Login != "" && e.w.s.p.cfg.Login != nil {
		return e.identifyByLogin(service, r)
	}
	return needsLogin(*spec)
}

func (e *exchange) identifyByToken(service policy.ProtectedService, r *http.Request, bearer string) *rejection {
	verified, err := e.w.s.p.cfg.Tokens.Verify(r.Context(), service, bearer)
	if err != nil {
		return tokenRefused(*service.Spec.HTTP, err)
	}
	r.Header.Del("Authorization")
	e.caller, e.token, e.expires = verified.Caller, bearer, verified.Expires
	e.caller.Address = e.w.s.client.Addr()
	return nil
}

func tokenRefused(spec policy.HTTPSpec, err error) *rejection {
	d := deny(http.StatusUnauthorized, flow.ReasonTokenRefused, "the token proves nobody here")
	d.header = challenge(spec)
	if errors.Is(err, token.ErrNoKeys) { // another token would be no better
		d = deny(http.StatusServiceUnavailable, flow.ReasonTokenRefused, "the keys of the token's provider are not known here now")
		d.header = http.Header{"Retry-After": {"10"}}
	}
	d.detail = err.Error()
	return d
}

func (e *exchange) identifyByLogin(service policy.ProtectedService, r *http.Request) *rejection {
	handler, now := e.w.s.p.cfg.Login, e.w.s.p.now()
	if handler.Serve(service, e.answer, r, now) {
		return &rejection{badRequest: badRequest{e.answer.status, flow.ReasonLoginNeeded, loginPage(e.answer.status)}, answered: true}
	}
	session, ok := handler.Session(service, e.answer, r, now)
	if !ok && handler.Redirect(service, e.answer, r, now) {
		return &rejection{badRequest: badRequest{e.answer.status, flow.ReasonLoginNeeded, "sent to the login"}, answered: true}
	}
	if !ok {
		return needsLogin(*service.Spec.HTTP)
	}
	e.caller, e.expires, e.login = session.Caller, session.Expires, &session
	e.caller.Address = e.w.s.client.Addr()
	return nil
}

// loginPage tells a login that failed from one that goes on. Why it failed can be long, and is the log's.
func loginPage(status int) string {
	if status < http.StatusBadRequest {
		return "a page of the login"
	}
	return fmt.Sprintf("the login failed with %d: the proxy's log says why (login failed)", status)
}

func needsLogin(spec policy.HTTPSpec) *rejection {
	d := deny(http.StatusUnauthorized, flow.ReasonLoginNeeded, "the service has to know who you are")
	d.header = challenge(spec)
	return d
}

// takes tells whether callers of a service may prove themselves in that way.
func takes(spec policy.HTTPSpec, how string) bool {
	return slices.Contains(spec.Authenticate, how) || len(spec.Authenticate) == 0 && how == policy.AuthenticateSPIFFE
}

func takesTokens(spec policy.HTTPSpec) bool {
	return takes(spec, policy.AuthenticateJWT) || takes(spec, policy.AuthenticateOIDC)
}

func challenge(spec policy.HTTPSpec) http.Header {
	if !takesTokens(spec) {
		return nil
	}
	return http.Header{"Www-Authenticate": {"Bearer"}}
}

func bearerToken(h http.Header) (string, bool) {
	scheme, token, ok := strings.Cut(h.Get("Authorization"), " ")
	return strings.TrimSpace(token), ok && strings.EqualFold(scheme, "Bearer")
}

// rewrite makes the request that the service gets.
func (e *exchange) rewrite(out *http.Request) {
	upgrade := out.Header.Get("Upgrade")
	removeProxysWord(out.Header)
	if upgrade != "" && !strings.EqualFold(upgrade, "websocket") { // behind another protocol nothing would be judged
		out.Header.Del("Upgrade")
		out.Header.Del("Connection")
	}
	setIdentity(out.Header, e.caller, e.target)
	out.Header.Set(headerVia, strings.Join(append(e.via, e.w.mark()), ", "))
	out.Trailer = nil
	out.Host = e.target.authority
	out.URL = &url.URL{Scheme: e.w.upstream.scheme(), Host: e.w.s.server.String(), Opaque: e.target.path, RawQuery: e.target.query}
}

// failed answers a request that the service did not answer. The headers of an answer have not been sent.
func (e *exchange) failed(rw http.ResponseWriter, err error) {
	var tooLarge *http.MaxBytesError
	var end *ending
	bad := badRequest{http.StatusBadGateway, flow.ReasonUpstreamFailed, "the service did not answer"}
	switch {
	case errors.As(context.Cause(e.ctx), &end):
		bad = badRequest{http.StatusForbidden, end.reason, "this is not allowed to you any more"}
	case e.body != nil && e.body.late.Load():
		bad = badRequest{http.StatusRequestTimeout, flow.ReasonRequestLimit, "the body comes too slowly"}
	case e.ctx.Err() != nil:
		e.answer.fail = &rejection{badRequest: badRequest{reason: flow.ReasonClosed}, detail: "client gave the request up"}
		panic(http.ErrAbortHandler) // a bare return would be an answer
	case errors.As(err, &tooLarge):
		bad = badRequest{http.StatusRequestEntityTooLarge, flow.ReasonRequestLimit, fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit)}
	case errors.Is(err, errUpstreams):
		bad = badRequest{http.StatusServiceUnavailable, flow.ReasonRequestLimit, err.Error()}
	case errors.Is(err, os.ErrDeadlineExceeded):
		bad.status = http.StatusGatewayTimeout
	}
	e.answer.fail = &rejection{badRequest: bad, detail: err.Error()}
	e.say(rw, bad, nil)
}

// say sends a short page.
func (e *exchange) say(rw http.ResponseWriter, bad badRequest, header http.Header) {
	for name, values := range header {
		rw.Header()[name] = values
	}
	rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
	rw.Header().Set("Cache-Control", "no-store")
	rw.Header().Set("X-Content-Type-Options", "nosniff")
	rw.WriteHeader(bad.status)
	_, _ = fmt.Fprintf(rw, "%sflow: %s, request %d\n", page(bad.status, bad.reason, bad.why), e.w.s.id, e.number)
}

// refuse records and answers a request that is not carried.
func (e *exchange) refuse(d *rejection) {
	e.w.noteRefused()
	if d.detail == "" {
		d.detail = d.why
	}
	rec := e.record(flow.EventDeny, flow.VerdictDenied, d.reason, d.detail)
	rec.Request.Status = d.status
	e.w.s.p.denials.add(rec)
	if d.answered {
		return
	}
	e.say(e.answer, d.badRequest, d.header)
}

// report tells of a request that was carried.
func (e *exchange) report() {
	reason, detail := e.outcome()
	rec := e.record(flow.EventRequest, flow.VerdictProxied, reason, detail)
	rec.Request.Status, rec.Request.Rule, rec.Request.Took = e.answer.status, e.rule, time.Since(e.began)
	e.w.s.p.cfg.Report(rec)
}

// outcome tells how a request that was let in ended. What ended it from outside goes before what that caused.
func (e *exchange) outcome() (flow.Reason, string) {
	var end *ending
	switch {
	case errors.As(context.Cause(e.ctx), &end):
		return end.reason, end.detail
	case e.w.s.wasCut() != nil:
		end = e.w.s.wasCut()
		return end.reason, end.detail
	case e.answer.fail != nil:
		return e.answer.fail.reason, e.answer.fail.detail
	case e.whole:
		return flow.ReasonIdentity, ""
	case e.ctx.Err() != nil:
		return flow.ReasonClosed, "client gave the request up"
	}
	return flow.ReasonUpstreamFailed, "the answer broke off"
}

func (e *exchange) record(event flow.Event, verdict flow.Verdict, reason flow.Reason, detail string) flow.Record {
	rec := e.w.s.record(event, verdict, reason, detail)
	who := e.caller
	if proven := e.w.s.identity(); who.String() == "" && len(proven.chain) > 0 {
		who = proven.caller // by the connection, which nobody got to ask for
	}
	rec.Identity, rec.Proof = who.String(), who.Proof
	rec.Request = &flow.Request{Number: e.number, Method: e.method, Host: e.target.host, Path: e.target.path}
	return rec
}

// countReset cuts a client that keeps giving up its requests, each of which has cost the service something.
func (e *exchange) countReset() {
	gaveUp := errors.Is(context.Cause(e.ctx), context.Canceled) && e.w.s.ctx.Err() == nil
	if gaveUp && e.w.http2 && !e.w.resets.Allow() {
		e.w.s.cut(flow.ReasonRequestLimit, "client resets its requests")
	}
}

// Error implements error: the cause of a request's end.
func (e *ending) Error() string { return fmt.Sprintf("%s: %s", e.reason, e.detail) }

func (e *exchange) cut(end *ending) { e.cancel(end) }

// objection tells why a request that was let in would not be let in now, or gives nil.
func (e *exchange) objection() *ending {
	p := e.w.s.p
	set := p.cfg.Policy.Set()
	service, ok := set.Service(e.w.s.identity().service)
	if !ok || service.Spec.HTTP == nil || !takes(*service.Spec.HTTP, authenticates(e.caller.Proof)) {
		return &ending{flow.ReasonPolicyChanged, "the service does not take this proof of identity any more"}
	}
	if e.login != nil && service.Spec.HTTP.Login != e.caller.Provider {
		return &ending{flow.ReasonPolicyChanged, "the service has no such login any more"}
	}
	if end := e.tokenObjection(service); end != nil {
		return end
	}
	if d := set.Authorise(service.Name, e.caller, &e.request, p.now()); !d.Allowed {
		return &ending{flow.ReasonPolicyChanged, fmt.Sprintf("%v any more: %s", errNotAuthorised, strings.Join(d.Near, "; "))}
	}
	return nil
}

// recheckToken bounds how long the look at one token may take, and keysPatience how long a request or connection goes on with one of
// which nobody can tell.
const (
	recheckToken = time.Second
	keysPatience = time.Minute
)

// doubt is that nobody can tell whether a token still counts: the keys of its provider are not known.
type doubt struct{ since atomic.Pointer[time.Time] }

// objects tells whether what a look at the token came to speaks against it. Doubt does when it lasts too long.
func (d *doubt) objects(err error, now time.Time) bool {
	if err == nil {
		d.since.Store(nil)
		return false
	}
	if !errors.Is(err, token.ErrNoKeys) {
		return true
	}
	d.since.CompareAndSwap(nil, &now)
	since := d.since.Load() // nil: another look has just ended it
	return since != nil && !now.Before(since.Add(keysPatience))
}

func (d *doubt) isOver() bool { return d.since.Load() == nil }

// tokenObjection asks for the request's token anew. Where the keys of its provider are not known at this moment, as when policy has
// them come from elsewhere, nothing speaks against it: it is asked for each second until that is settled.
func (e *exchange) tokenObjection(service policy.ProtectedService) *ending {
	if e.token == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(e.w.s.ctx, recheckToken)
	defer cancel()
	_, err := e.w.s.p.cfg.Tokens.Verify(ctx, service, e.token)
	if !e.doubt.objects(err, e.w.s.p.now()) {
		return nil
	}
	return &ending{flow.ReasonSessionEnded, "its token is not taken any more: " + err.Error()}
}

func authenticates(proof string) string {
	if proof == "" {
		return policy.AuthenticateSPIFFE
	}
	return proof
}

// over tells why what proved the caller does not count any more, or gives nil. A change of policy is for objection.
func (e *exchange) over(now time.Time) *ending {
	if !e.expires.IsZero() && !now.Before(e.expires) {
		return &ending{flow.ReasonSessionEnded, "its token or login was valid until " + e.expires.UTC().Format(time.RFC3339)}
	}
	if e.login == nil {
		return nil
	}
	service, ok := e.w.s.p.cfg.Policy.Set().Service(e.w.s.identity().service)
	if ok && service.Spec.HTTP != nil && service.Spec.HTTP.Login == e.caller.Provider && !e.w.s.p.cfg.Login.Lives(service, *e.login, now) {
		return &ending{flow.ReasonSessionEnded, "its login was ended"}
	}
	return nil
}
