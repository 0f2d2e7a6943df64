package agent

import (
	"strings"
	"unicode"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// maxText bounds what one text field of the proxy's records may hold; a SPIFFE ID has at most 2048 bytes.
const maxText = 2048

// fromProxy makes a record of the proxy's own words safe to keep beside the kernel's. The proxy parses untrusted bytes and
// may have been taken over: it can tell nothing about paths, and its records stay marked as its own.
func fromProxy(rec flow.Record) flow.Record {
	rec.CPU = -1
	rec.Grant, rec.Slot, rec.Device, rec.Caller = "", 0, "", nil
	if rec.Verdict != flow.VerdictProxied {
		rec.Verdict = flow.VerdictDenied
	}
	rec.Count = max(rec.Count, 1)
	for _, field := range []*string{&rec.FlowID, &rec.Protocol, &rec.Service, &rec.Identity, &rec.Detail, &rec.Proof, &rec.Application} {
		*field = plain(*field)
	}
	if r := rec.Request; r != nil {
		for _, field := range []*string{&r.Method, &r.Host, &r.Path, &r.Rule} {
			*field = plain(*field)
		}
	}
	return rec
}

// plain cuts a text and drops what a terminal would obey.
func plain(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s)
}
