package main

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/crewjam/saml"
)

const (
	// maxResponse bounds the XML that is read.
	maxResponse = 256 << 10
	bearer      = "urn:oasis:names:tc:SAML:2.0:cm:bearer"
	transient   = "urn:oasis:names:tc:SAML:2.0:nameid-format:transient"
)

// person is whom an assertion is about.
type person struct {
	subject string
	groups  []string
	at      time.Time // when the person proved who it is
	ends    time.Time // of the session at the identity provider; zero: it does not say
}

// judge reads the answer to the request of that id. What it takes was signed by the identity provider, for this service, for
// this request, now, and not brought before.
func (b *bridge) judge(encoded, request string, now time.Time) (person, error) {
	if base64.StdEncoding.DecodedLen(len(encoded)) > maxResponse {
		return person{}, fmt.Errorf("response is longer than %d bytes", maxResponse)
	}
	text, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return person{}, fmt.Errorf("decode response: %w", err)
	}
	if err := single(text); err != nil {
		return person{}, err
	}
	a, err := b.saml.ParseXMLResponse(text, []string{request}, b.saml.AcsURL)
	if err != nil {
		var invalid *saml.InvalidResponseError
		if errors.As(err, &invalid) {
			err = invalid.PrivateErr // the other text says nothing, for strangers
		}
		return person{}, err
	}
	if err := b.strict(a, now); err != nil {
		return person{}, err
	}
	return b.person(a, now)
}

// strict asks for what the library takes as given where an assertion leaves it out.
func (b *bridge) strict(a *saml.Assertion, now time.Time) error {
	if a.ID == "" || a.Subject == nil || a.Conditions == nil {
		return errors.New("assertion has no ID, subject or conditions")
	}
	if len(a.Subject.SubjectConfirmations) == 0 {
		return errors.New("assertion does not say for whom it may be brought (SubjectConfirmation)")
	}
	for _, c := range a.Subject.SubjectConfirmations {
		if c.Method != bearer || c.SubjectConfirmationData == nil {
			return fmt.Errorf("assertion is confirmed by %q, not by who brings it", c.Method)
		}
	}
	if len(a.Conditions.AudienceRestrictions) == 0 {
		return errors.New("assertion is for no audience")
	}
	for _, r := range a.Conditions.AudienceRestrictions {
		if r.Audience.Value != b.saml.EntityID {
			return fmt.Errorf("assertion is for %q", r.Audience.Value)
		}
	}
	if a.Conditions.NotOnOrAfter.IsZero() || a.Conditions.NotOnOrAfter.After(now.Add(24*time.Hour)) {
		return errors.New("assertion counts for more than a day")
	}
	if !b.seen.keep(a.ID, struct{}{}, now, a.Conditions.NotOnOrAfter.Add(saml.MaxClockSkew)) {
		return errors.New("assertion was brought before, or there are too many")
	}
	return nil
}

func (b *bridge) person(a *saml.Assertion, now time.Time) (person, error) {
	p := person{at: now}
	if b.subject != "" {
		if values := attribute(a, b.subject); len(values) == 1 {
			p.subject = values[0]
		}
	} else if id := a.Subject.NameID; id != nil && id.Format != transient {
		p.subject = id.Value
	}
	if p.subject == "" {
		return p, errors.New("assertion names nobody for good; name the attribute that does with -subject")
	}
	p.groups = attribute(a, b.groups)
	for _, s := range a.AuthnStatements {
		if end := s.SessionNotOnOrAfter; end != nil && (p.ends.IsZero() || end.Before(p.ends)) {
			p.ends = *end
		}
		p.at = s.AuthnInstant
	}
	if !p.ends.IsZero() && !now.Before(p.ends) {
		return p, errors.New("session at the identity provider has ended")
	}
	return p, nil
}

// attribute is all values of the attributes of that name.
func attribute(a *saml.Assertion, name string) (values []string) {
	for _, s := range a.AttributeStatements {
		for _, attr := range s.Attributes {
			if attr.Name != name && attr.FriendlyName != name {
				continue
			}
			for _, v := range attr.Values {
				values = append(values, v.Value)
			}
		}
	}
	return values
}

// single refuses a response in which there is more than one thing to take for the signed one: signature wrapping needs a second
// assertion or response somewhere, and readers that choose differently. Nothing is verified here, and all of it before anything is.
func single(text []byte) error {
	if err := plain(text); err != nil {
		return err
	}
	var path []string
	count, ids := map[string]int{}, map[string]bool{}
	for d := xml.NewDecoder(bytes.NewReader(text)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("read response: %w", err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			path = append(path, e.Name.Local)
			count[e.Name.Local]++
			if e.Name.Local == "Assertion" && len(path) != 2 {
				return errors.New("assertion is not right below the response")
			}
			for _, a := range e.Attr {
				if a.Name.Local != "ID" && a.Name.Local != "Id" && a.Name.Local != "id" {
					continue
				}
				if ids[a.Value] {
					return errors.New("two elements have the same ID")
				}
				ids[a.Value] = true
			}
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
	if count["Response"] != 1 || count["Assertion"] != 1 || count["EncryptedAssertion"] > 0 || count["Object"] > 0 || count["Signature"] > 2 {
		return fmt.Errorf("response must have one assertion that is not encrypted, and nothing beside it: it has %v", count)
	}
	return nil
}

// plain refuses what readers of XML differ about, or what splits a text: comments, CDATA, document types, instructions.
func plain(text []byte) error {
	rest, _ := bytes.CutPrefix(bytes.TrimSpace(text), []byte("<?xml "))
	for _, odd := range []string{"<!", "<?"} {
		if bytes.Contains(rest, []byte(odd)) {
			return fmt.Errorf("the XML has %q: comments, CDATA, document types and instructions are not taken", odd)
		}
	}
	return nil
}

// serviceProvider is what the identity provider knows this program as.
func serviceProvider(issuer *url.URL, idp *saml.EntityDescriptor) saml.ServiceProvider {
	metadata, acs := issuer.JoinPath("saml/metadata"), issuer.JoinPath("saml/acs")
	return saml.ServiceProvider{EntityID: metadata.String(), MetadataURL: *metadata, AcsURL: *acs, IDPMetadata: idp,
		AuthnNameIDFormat: saml.UnspecifiedNameIDFormat, AllowIDPInitiated: false}
}
