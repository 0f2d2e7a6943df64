package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// errNotSigned says that OpenSSH did not sign: nobody touched the security key, a wrong passphrase, no agent.
var errNotSigned = errors.New("not signed")

// sshKey is a key of OpenSSH: in a file, in its agent, or in a security key. ssh-keygen makes the signature, and asks for
// what it needs on the terminal.
type sshKey struct {
	file   string
	public policy.PublicKey
	talk   io.Writer
}

const (
	armorType  = "SSH SIGNATURE"
	publicFile = ".pub"
)

// readSigningKey finds out what a file holds: a key as sallyport keygen makes it, or one of OpenSSH, either half. What
// OpenSSH says while it signs goes to talk.
func readSigningKey(path string, talk io.Writer) (grant.SigningKey, error) {
	head, err := readHead(path)
	if err != nil {
		return nil, &policy.Error{File: path, Msg: "read private key: " + fileCause(err), Hint: "check the path, and who owns the file", Err: err}
	}
	if !strings.HasPrefix(head, "-----BEGIN OPENSSH PRIVATE KEY-----") && !strings.HasSuffix(path, publicFile) {
		return grant.ReadPrivateKey(path)
	}
	public, err := readSSHPublic(strings.TrimSuffix(path, publicFile) + publicFile)
	if err != nil {
		return nil, err
	}
	return sshKey{file: path, public: public, talk: talk}, nil
}

// readHead is enough of a file to tell what it is.
func readHead(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 64)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", err
	}
	return string(head[:n]), nil
}

// readSSHPublic reads a .pub file: type, key, and a comment that nobody needs.
func readSSHPublic(path string) (policy.PublicKey, error) {
	const hint = "put the public half beside it: ssh-keygen -y -f KEY > KEY.pub"
	text, err := os.ReadFile(path)
	if err != nil {
		return policy.PublicKey{}, &policy.Error{File: path, Msg: "read public key: " + fileCause(err), Hint: hint, Err: err}
	}
	words := strings.Fields(string(text))
	if len(words) < 2 {
		return policy.PublicKey{}, &policy.Error{File: path, Msg: "read public key: it has no key", Hint: hint, Err: grant.ErrKeyFile}
	}
	k, err := policy.ParsePublicKey(words[0] + " " + words[1])
	if e, ok := errors.AsType[*policy.Error](err); ok {
		e.File = path
	}
	return k, err
}

// Public is the key's public half, as it stands in a Keyring.
func (k sshKey) Public() policy.PublicKey { return k.public }

// Sign has ssh-keygen sign.
func (k sshKey) Sign(ctx context.Context, message []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "ssh-keygen", "-Y", "sign", "-n", policy.SSHNamespace, "-f", k.file)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(message), io.MultiWriter(&said, k.talk)
	armored, err := cmd.Output()
	if err != nil {
		return nil, &policy.Error{File: k.file, Msg: fmt.Sprintf("ssh-keygen did not sign: %v: %s", err, lastLine(said.String())),
			Hint: "unlock the key, touch the device, or add it to ssh-agent", Err: errNotSigned}
	}
	block, _ := pem.Decode(armored)
	if block == nil || block.Type != armorType || !k.public.Verify(message, block.Bytes) {
		return nil, &policy.Error{File: k.file, Msg: "ssh-keygen gave no signature of this key", Hint: "check that the .pub file beside it is its own", Err: errNotSigned}
	}
	return block.Bytes, nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// fileCause is what went wrong with a file, without the file's name.
func fileCause(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err.Error()
	}
	return err.Error()
}
