package main

import (
	"bytes"
	"context"
	"crypto/sha1" // SPDX wants it of files, beside a better one
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"
)

const (
	noAssertion = "NOASSERTION"
	ours        = "Sallyport" // element of the whole
)

// sbom writes, in SPDX 2.3, which modules are in which program, with the hashes of both.
func (r release) sbom(_ context.Context, t tree) (string, error) {
	doc, err := r.document(t)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	if err := json.Write(doc, &out, json.Indent("  ")); err != nil {
		return "", fmt.Errorf("write SBOM: %w", err)
	}
	name := r.name() + ".spdx.json"
	return name, os.WriteFile(filepath.Join(r.out, name), out.Bytes(), 0o644)
}

// name is that of a file of this release, without what says of which kind.
func (r release) name() string { return "sallyport_" + r.debian() + "_" + arch }

func (r release) document(t tree) (*spdx.Document, error) {
	doc := &spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT", DocumentName: r.name(),
		CreationInfo: &spdx.CreationInfo{Creators: []common.Creator{{CreatorType: "Tool", Creator: "sallyport-tools-package"}}, Created: r.at.Format(time.RFC3339)},
	}
	whole := &spdx.Package{
		PackageName: "sallyport", PackageSPDXIdentifier: ours, PackageVersion: r.debian(), PackageDownloadLocation: "git+https://github.com/sallyport-dev/sallyport@" + r.commit,
		FilesAnalyzed: false, IsFilesAnalyzedTagPresent: true, PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: "Apache-2.0", PackageCopyrightText: noAssertion,
	}
	doc.Packages = append(doc.Packages, whole)
	doc.Relationships = append(doc.Relationships, relation("DOCUMENT", "DESCRIBES", ours))
	content := sha256.New()
	for _, p := range programs {
		f, err := r.program(p)
		if err != nil {
			return nil, err
		}
		doc.Files = append(doc.Files, f)
		doc.Relationships = append(doc.Relationships, relation(ours, "CONTAINS", f.FileSPDXIdentifier))
		fmt.Fprintln(content, f.Checksums)
	}
	doc.DocumentNamespace = fmt.Sprintf("https://github.com/sallyport-dev/sallyport/spdx/%s-%x", r.name(), content.Sum(nil))
	for _, m := range t.modules {
		p := m.describe()
		doc.Packages = append(doc.Packages, p)
		for _, in := range m.in {
			doc.Relationships = append(doc.Relationships, relation(fileID(in), "STATIC_LINK", p.PackageSPDXIdentifier))
		}
	}
	return doc, nil
}

func relation(a common.ElementID, kind string, b common.ElementID) *spdx.Relationship {
	return &spdx.Relationship{RefA: common.MakeDocElementID("", string(a)), RefB: common.MakeDocElementID("", string(b)), Relationship: kind}
}

func fileID(program string) common.ElementID { return common.ElementID("File-" + program) }

func (r release) program(name string) (*spdx.File, error) {
	data, err := os.ReadFile(filepath.Join(r.binaries, name))
	if err != nil {
		return nil, err
	}
	return &spdx.File{
		FileName: "./usr/bin/" + name, FileSPDXIdentifier: fileID(name), FileTypes: []string{"BINARY"}, LicenseConcluded: noAssertion, FileCopyrightText: noAssertion,
		Checksums: []common.Checksum{
			{Algorithm: common.SHA1, Value: fmt.Sprintf("%x", sha1.Sum(data))},
			{Algorithm: common.SHA256, Value: fmt.Sprintf("%x", sha256.Sum256(data))},
		},
	}, nil
}

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]`)

// describe has the hash of go.sum in words: it is one of all files by name, and no checksum that SPDX knows.
func (m module) describe() *spdx.Package {
	p := &spdx.Package{
		PackageName: m.Path, PackageSPDXIdentifier: common.ElementID("Module-" + notInID.ReplaceAllString(m.Path+"-"+m.Version, "-")), PackageVersion: m.Version,
		PackageDownloadLocation: noAssertion, FilesAnalyzed: false, IsFilesAnalyzedTagPresent: true,
		PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: noAssertion, PackageCopyrightText: noAssertion,
		PackageExternalReferences: []*spdx.PackageExternalReference{{Category: "PACKAGE-MANAGER", RefType: "purl", Locator: "pkg:golang/" + m.Path + "@" + m.Version}},
	}
	if m.Sum != "" {
		p.PackageSourceInfo = "go.sum: " + m.Sum
	}
	return p
}
