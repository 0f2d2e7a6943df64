package login

import (
	"net/http"
	"net/url"
	"time"
)

// maxSession is more than any policy lets a session last.
const maxSession = 31 * 24 * time.Hour

// askLogout shows the button: an address alone must not log out, since any page can send a browser there.
func (v visit) askLogout() {
	if s, ok := v.h.read(v.service, v.r); ok && s.counts(v.provider, v.now) && !v.h.ended.has(s.ID, s.runsOut()) {
		v.say(http.StatusOK, page{Title: "Log out?", Text: "You are logged in as " + s.caller(v.provider).String() + ".", Out: true})
		return
	}
	v.say(http.StatusOK, page{Title: "Logged out", Text: "Nobody is logged in here with this browser.", Again: loginPath})
}

// logout ends the session here, also for copies of its cookie, and then at the provider where that can be asked for it.
func (v visit) logout() {
	if err := v.h.crossSite.Check(v.r); err != nil {
		v.fail(http.StatusForbidden, "Another site asked to log you out. You were not.", err)
		return
	}
	if s, ok := v.h.read(v.service, v.r); ok {
		v.h.ended.add(s.ID, s.runsOut(), v.now)
		v.h.log.Info("browser logged out", "service", v.service.Name, "caller", s.caller(v.provider).String())
	}
	for i := range maxParts {
		if name := partName(sessionCookie(v.service.Name), i); i == 0 || len(v.r.CookiesNamed(name)) > 0 {
			forget(v.w, name)
		}
	}
	forget(v.w, browserCookie(v.service.Name))
	m, err := v.h.providers.metadata(v.r.Context(), v.provider, v.now)
	if err != nil || m.Logout == "" {
		v.say(http.StatusOK, page{Title: "Logged out", Text: "You are logged out here, and may still be at " + v.provider.Name + ".", Again: loginPath})
		return
	}
	u, err := url.Parse(m.Logout)
	if err != nil {
		v.fail(http.StatusBadGateway, "You are logged out here, and may still be at "+v.provider.Name+".", err)
		return
	}
	q := u.Query()
	q.Set("client_id", v.provider.Spec.Login.ClientID)
	u.RawQuery = q.Encode()
	v.see(u.String())
}
