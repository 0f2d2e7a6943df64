package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

// Web carries the requests of plain local HTTP clients to a protected service with http, and shows our token with each.
type Web struct {
	cfg     TunnelConfig
	name    string // of the service, and the port
	reverse *httputil.ReverseProxy
}

// NewWeb checks the configuration, whose Bearer must be set. It does not dial.
func NewWeb(cfg TunnelConfig) (*Web, error) {
	_, port, err := net.SplitHostPort(cfg.Server)
	if err != nil {
		return nil, fmt.Errorf("read server address: %w", err)
	}
	if cfg.TLS == nil || cfg.TLS.ServerName == "" || cfg.Bearer == nil {
		return nil, errors.New("carry requests: no TLS configuration with the service's name, or no token")
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Web{cfg: cfg, name: net.JoinHostPort(cfg.TLS.ServerName, port)}
	secure := cfg.TLS.Clone()
	secure.NextProtos = nil // those of HTTP
	d := net.Dialer{Timeout: cfg.DialTimeout, KeepAlive: 15 * time.Second}
	transport := &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "tcp", cfg.Server) },
		TLSClientConfig: secure, TLSHandshakeTimeout: cfg.DialTimeout, ForceAttemptHTTP2: true, IdleConnTimeout: time.Minute,
		DisableCompression: true,
	}
	w.reverse = &httputil.ReverseProxy{Rewrite: w.rewrite, Transport: transport, ErrorHandler: w.failed,
		ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug)}
	return w, nil
}

// Serve answers on l until ctx ends, then cuts the live requests. It closes l. The end of ctx is no error.
func (w *Web) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{Handler: w, ReadHeaderTimeout: w.cfg.DialTimeout, Protocols: new(http.Protocols), BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog: slog.NewLogLogger(w.cfg.Logger.Handler(), slog.LevelDebug)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true) // as gRPC has it
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(l)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("accept connection: %w", err)
}

type tokenKey struct{}

// ServeHTTP implements http.Handler.
func (w *Web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	if why := foreign(r); why != "" {
		w.cfg.Logger.Warn("request is not carried", "reason", why)
		http.Error(rw, "sallyport forward: "+why, http.StatusForbidden)
		return
	}
	token, err := w.cfg.Bearer(r.Context())
	if err != nil {
		w.failed(rw, r, err)
		return
	}
	w.reverse.ServeHTTP(rw, r.WithContext(context.WithValue(r.Context(), tokenKey{}, token)))
}

// foreign says why a request is not that of a program here: a page of another site in a browser of ours must not act as us, by a
// name of its own that leads here, or as one of several sites.
func foreign(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	if a := net.ParseIP(host); a == nil && host != "localhost" {
		return "it is asked for by the name " + host + ": ask by the address that it listens on"
	}
	switch site := r.Header.Get("Sec-Fetch-Site"); site {
	case "", "none", "same-origin":
	default:
		return "a page of another site asks"
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		if u, err := url.Parse(origin); err != nil || u.Host != r.Host {
			return "a page of another site asks"
		}
	}
	return ""
}

func (w *Web) rewrite(r *httputil.ProxyRequest) {
	r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "https", w.name, w.name
	token, _ := r.In.Context().Value(tokenKey{}).(string)
	r.Out.Header.Set("Authorization", "Bearer "+token)
	if r.Out.Header.Get("Origin") != "" { // as a browser there would say it
		r.Out.Header.Set("Origin", "https://"+w.name)
	}
}

// failed answers a request that came to no answer.
func (w *Web) failed(rw http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() == nil {
		w.cfg.Logger.Warn("request failed", "server", w.cfg.Server, "error", err)
	}
	status := http.StatusBadGateway
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok && errors.Is(err, ErrRefused) {
		status = http.StatusUnauthorized
	}
	http.Error(rw, "sallyport forward: "+err.Error(), status)
}
