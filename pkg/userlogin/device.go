package userlogin

import (
	"context"
	"errors"
)

// ErrNoDevices says that the provider has no logins for devices without a browser.
var ErrNoDevices = errors.New("the identity provider has no device flow")

// Device logs a person in who has a browser elsewhere (RFC 8628). show is told where to go and which code to enter there;
// whole is an address with the code in it, or empty. It waits until the person has answered, the code has expired, or ctx ends.
func (p *Provider) Device(ctx context.Context, show func(address, code, whole string)) (Kept, error) {
	if p.config.Endpoint.DeviceAuthURL == "" {
		return Kept{}, ErrNoDevices
	}
	begun, err := p.config.DeviceAuth(p.context(ctx), p.options()...)
	if err != nil {
		return Kept{}, judge("begin the login", err)
	}
	show(begun.VerificationURI, begun.UserCode, begun.VerificationURIComplete)
	token, err := p.config.DeviceAccessToken(p.context(ctx), begun, p.redeem()...)
	if err != nil {
		return Kept{}, judge("wait for the login", err)
	}
	return p.kept(ctx, token, "")
}
