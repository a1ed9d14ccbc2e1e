# Joins this machine to the Ollama Coordinator at @URL:
#   @IRM | iex
# The same line again starts the agent again, in the version of its coordinator.
# $env:JOIN_FOLDER is another folder; with $env:JOIN_START='no' nothing is started.
& {
    $ErrorActionPreference = 'Stop'
    $ProgressPreference = 'SilentlyContinue'
    if ($IsLinux -or $IsMacOS) { throw "join: in a shell of this system, the line is: @CURL | sh" }
    $url = '@URL'
    $common = '@COMMON'
    $agent = '@AGENT'
    $version = '@VERSION'
    # The public key and the SHA-256 of a certificate that the coordinator has made itself.
    $pin = '@PIN'
    $certificate = '@CERTIFICATE'
    $folder = if ($env:JOIN_FOLDER) { $env:JOIN_FOLDER } else { Join-Path $env:LOCALAPPDATA 'ollama-coordinator-agent' }
    $at = Join-Path $folder 'Scripts\python.exe'
    $program = Join-Path $folder 'Scripts\ollama-coordinator-agent.exe'

    function Test-Run([scriptblock]$command) {
        $ErrorActionPreference = 'Continue' # else a warning that it writes would end this in 5.1
        try { & $command 2>$null | Out-Null; return $LASTEXITCODE -eq 0 } catch { return $false }
    }
    function Invoke-Step([scriptblock]$command) {
        & $command
        if ($LASTEXITCODE -ne 0) { throw "join: this failed: $command" }
    }

    function Get-File([string]$from, [string]$to) {
        if ($pin) { Invoke-Step { curl.exe -fsSLk --pinnedpubkey $pin -o $to $from } }
        else { Invoke-WebRequest -UseBasicParsing $from -OutFile $to }
    }

    $uv = [bool](Get-Command uv -ErrorAction SilentlyContinue)
    $python = @('python', 'python3', 'py') | Where-Object {
        $name = $_
        Test-Run { & $name -c 'import sys; sys.exit(sys.version_info < (3, 11))' }
    } | Select-Object -First 1
    if ($uv) { $tool = 'uv' }
    elseif ($python) { $tool = 'pip' }
    else { throw 'join: this needs Python 3.11 or later, or uv (https://docs.astral.sh/uv/)' }

    Write-Host "This machine joins the Ollama Coordinator at $url."
    Write-Host "  1. The agent, version $version, is installed with $tool into $folder"
    Write-Host '     (its own environment; aiohttp and the others come from your package index).'
    if ($env:JOIN_START -eq 'no') { Write-Host '  2. Nothing is started.' }
    else { Write-Host "  2. $program starts here, until Ctrl-C." }
    Write-Host 'Nothing else is changed. To undo it, delete that folder.'

    $got = Join-Path ([IO.Path]::GetTempPath()) ([Guid]::NewGuid())
    New-Item -ItemType Directory -Path $got | Out-Null
    try {
        $wheels = foreach ($name in @($common, $agent)) {
            $file = Join-Path $got $name
            Get-File "$url/join/$name" $file
            $file
        }
        # A program that runs can be renamed on Windows, and not be replaced.
        if (Test-Path $program) {
            Remove-Item "$program.old" -Force -ErrorAction SilentlyContinue
            Move-Item $program "$program.old" -Force -ErrorAction SilentlyContinue
        }
        if ($uv) {
            if (-not (Test-Run { & $at -c pass })) { Invoke-Step { uv venv -q --clear -p '>=3.11' $folder } }
            Invoke-Step {
                uv pip install -q --python $at --reinstall-package ollama-coordinator-common `
                    --reinstall-package ollama-coordinator-agent $wheels
            }
        }
        else {
            if (-not (Test-Run { & $at -c pass })) {
                Invoke-Step { & $python -m venv --clear --without-pip $folder }
            }
            $pip = Join-Path $got 'pip.whl'
            Get-File "$url/join/pip.whl" $pip
            $run = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('pip', run_name='__main__', alter_sys=True)"
            # Another build of the same version replaces the one that is there.
            Invoke-Step { & $at -c $run $pip install -q --no-deps --force-reinstall $wheels }
            Invoke-Step { & $at -c $run $pip install -q $wheels }
        }
    }
    finally {
        Remove-Item -Recurse -Force $got
        $kept = (Test-Path "$program.old") -and -not (Test-Path $program)
        if ($kept) { Move-Item "$program.old" $program }
    }
    Set-Content -Path (Join-Path $folder 'joined-to') -Value @($url, $certificate) -Encoding ascii
    if ($env:JOIN_START -eq 'no') { return }
    $env:COORDINATOR_URL = $url
    if ($certificate) { $env:COORDINATOR_CERTIFICATE = $certificate }
    & $program
}
